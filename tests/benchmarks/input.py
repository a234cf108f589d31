"""Whole loaders: JPEG files in, batches of random views out."""

import io
import itertools
import json
import shutil
import tarfile
import time
from collections.abc import Iterable, Sized
from pathlib import Path
from typing import Any

import numpy as np

from tests.benchmarks import photos
from tests.benchmarks.measure import Cost, Work, paired, ratio, short
from tests.benchmarks.table import Row, Table, installed
from trainer.images import cache
from trainer.images.augment import Augmentation
from trainer.images.decode import Preprocessing
from trainer.images.folder import ImageFolder, Split, scan
from trainer.images.loader import ImageLoader, Reader

TITLE = "Input"
WORKERS, BATCH, SIZE = 2, 32, 224
# So many that the start of worker processes, and a cache's last flush, weigh no more than in a run.
SMALL = 1200
SCALE, RATIO = (0.08, 1.0), (3 / 4, 4 / 3)  # torchvision's RandomResizedCrop
PREPROCESSING = Preprocessing(256, SIZE, "bilinear")
UNCACHED = "ours, not cached"
FIRST = "ours, not cached, a run's first epoch"
BUILDING = "ours, a run's first epoch, which builds the cache"
NOTE = f"""Images per second and CPU time per image of whole loaders, against torchvision's
ImageFolder + PIL + DataLoader: RandomResizedCrop({SIZE}, scale {SCALE}) and flip, batches of
{BATCH} (of the large pictures 5), {WORKERS} worker processes or threads. The peers end in ToTensor,
without Normalize; ours in uint8, which the network normalises. The pictures are random crops of
real photos, JPEG quality {photos.QUALITY}, on a warm page cache. "First batch" is from the start of
an epoch. "A run's first epoch": before it each picture is decoded once, to see whether it can be;
where a cache is built, its pixels are kept then."""


def measure(scratch: Path, rounds: int) -> Table:
    small = photos.write(scratch / "small", SMALL, 500, 375)
    large = photos.write(scratch / "large", 20, 4000, 3000)
    peers, missing = {}, []
    for package, make in {"timm": timm_loader, "webdataset": webdataset_loader}.items():
        if installed(package):
            peers[package] = epochs(make(small))
        else:
            missing.append(package)

    contenders = {
        "torchvision + PIL + DataLoader": epochs(torchvision_loader(small)),
        **peers,
        UNCACHED: epochs(make_loader(small)),
        FIRST: first_epoch(small, scratch / "fresh", keep=False),
        BUILDING: first_epoch(small, scratch / "fresh", keep=True),
        "ours, packed": epochs(make_loader(small, packed(small, scratch)), 4),
    }
    targets = {UNCACHED: 1.6, "ours, packed": 12.0}
    costs = paired(contenders, rounds)
    rows = _rows(
        "~500x375",
        costs,
        first_batches(
            {"torchvision + PIL + DataLoader": torchvision_loader(small)}
            | {
                UNCACHED: make_loader(small),
                "ours, packed": make_loader(small, packed(small, scratch)),
            },
            rounds,
        ),
        targets,
    )
    for against, what, target in (
        (UNCACHED, "an epoch that isn't cached", 0.95),
        (FIRST, "a run's first epoch that isn't cached", None),
    ):
        building = ratio(*([cost.wall for cost in costs[name]] for name in (against, BUILDING)))
        rows.append(
            Row(
                f"~500x375: building the cache, against {what}",
                (str(building), "", "", "", ""),
                f"{target:g}x" if target else "",
                building.median >= target if target else None,
            )
        )

    costs = paired(
        {
            "torchvision + PIL + DataLoader": epochs(torchvision_loader(large)),
            UNCACHED: epochs(make_loader(large)),
            "ours, packed": epochs(make_loader(large, packed(large, scratch), passes=20)),
        },
        rounds,
    )
    rows += _rows("12 megapixels", costs, {}, {UNCACHED: 3.0, "ours, packed": 100.0})
    columns = ("throughput", "CPU per image", "images/s", "CPU ms per image", "first batch, s")
    return Table(TITLE, NOTE, columns, rows, ("pillow", "timm", "webdataset"), missing)


def _rows(
    pictures: str, costs: dict[str, list[Cost]], first: dict[str, float], targets: dict[str, float]
) -> list[Row]:
    base, rows = next(iter(costs.values())), []
    for name, ours in costs.items():
        wall = ratio([cost.wall for cost in base], [cost.wall for cost in ours])
        cpu = ratio([cost.cpu for cost in base], [cost.cpu for cost in ours])
        typical = [
            float(np.median(values))
            for values in ([1 / cost.wall for cost in ours], [1000 * cost.cpu for cost in ours])
        ]
        cells = (
            str(wall),
            str(cpu),
            *map(short, typical),
            short(first[name]) if name in first else "",
        )
        target = targets.get(name)
        met = min(wall.median, cpu.median) >= target if target else None
        rows.append(Row(f"{pictures}: {name}", cells, f"{target:g}x" if target else "", met))
    return rows


def epochs(loader: Any, count: int = 1) -> Work:
    """Work that reads `count` epochs of the loader: an iterable of batches, afresh each time."""
    numbers = itertools.count()

    def work() -> int:
        images = 0
        for _ in range(count):
            batches = iter(
                loader.train_batches(next(numbers)) if isinstance(loader, ImageLoader) else loader
            )
            images += sum(len(batch[0]) for batch in batches)
        return images

    return work


def first_batches(loaders: dict[str, Iterable[Any]], rounds: int) -> dict[str, float]:
    """Seconds from the start of an epoch to its first batch, in the middle of the rounds."""
    seconds: dict[str, list[float]] = {name: [] for name in loaders}
    for number in range(rounds):
        for name, loader in loaders.items():
            started = time.perf_counter()
            batches = iter(
                loader.train_batches(number) if isinstance(loader, ImageLoader) else loader
            )
            next(batches)
            seconds[name].append(time.perf_counter() - started)
            del batches
    return {name: float(np.median(values)) for name, values in seconds.items()}


# --- ours ---


def make_loader(root: Path, read: Reader | None = None, passes: int = 1) -> ImageLoader:
    folder = pictures(root, passes)
    return ImageLoader(
        folder,
        PREPROCESSING,
        Augmentation(SCALE, RATIO, flip=True, trivial=False),
        batch_size(folder.splits["train"].paths),
        0,
        WORKERS,
        read=read,
    )


def batch_size(pictures: Sized) -> int:
    """Such that each worker has a batch to make, even of few pictures."""
    return min(BATCH, len(pictures) // (2 * WORKERS))


def pictures(root: Path, passes: int = 1) -> ImageFolder:
    """The pictures of root/train, `passes` times over."""
    folder = scan({"train": str(root / "train"), "valid": str(root / "train")}, 0.1)
    split = folder.splits["train"]
    return ImageFolder(
        folder.classes,
        {"train": Split(split.paths * passes, np.tile(split.labels, passes))},
        (),
    )


def packed(root: Path, scratch: Path, keep: bool = True) -> cache.Packed:
    paths = pictures(root).splits["train"].paths
    store = cache.PixelCache(scratch / "pixels", PREPROCESSING.resize, PREPROCESSING.interpolation)
    return store.pack(paths, WORKERS, lambda done, total: None, keep)


def first_epoch(root: Path, scratch: Path, keep: bool) -> Work:
    """The look at all pictures, from nothing, and the epoch after it. keep: what was decoded."""

    def work() -> int:
        shutil.rmtree(scratch, ignore_errors=True)
        return epochs(make_loader(root, packed(root, scratch, keep)))()

    return work


# --- peers ---


def torchvision_loader(root: Path) -> Any:
    from torch.utils.data import DataLoader
    from torchvision import datasets, transforms

    views = [
        transforms.RandomResizedCrop(SIZE, SCALE, RATIO),
        transforms.RandomHorizontalFlip(),
        transforms.ToTensor(),
    ]
    pictures = datasets.ImageFolder(str(root / "train"), transforms.Compose(views))
    return DataLoader(
        pictures, batch_size(pictures), shuffle=True, drop_last=True, num_workers=WORKERS
    )


def timm_loader(root: Path) -> Any:
    from timm.data import create_loader
    from torchvision.datasets import ImageFolder

    return create_loader(
        ImageFolder(str(root / "train")),
        (3, SIZE, SIZE),
        BATCH,
        is_training=True,
        use_prefetcher=False,
        scale=SCALE,
        ratio=RATIO,
        color_jitter=None,
        interpolation="bilinear",
        mean=(0, 0, 0),
        std=(1, 1, 1),
        num_workers=WORKERS,
        persistent_workers=False,
    )


def webdataset_loader(root: Path) -> Any:
    import webdataset
    from torchvision import transforms

    shards = root / "shards"
    shards.mkdir()
    files = sorted((root / "train").glob("*/*.jpg"))
    for shard in range(2 * WORKERS):
        with tarfile.open(shards / f"{shard:03d}.tar", "w") as tar:
            for number, path in list(enumerate(files))[shard :: 2 * WORKERS]:
                label = json.dumps(int(path.parent.name.removeprefix("class"))).encode()
                for name, data in (
                    (f"{number:06d}.jpg", path.read_bytes()),
                    (f"{number:06d}.cls", label),
                ):
                    entry = tarfile.TarInfo(name)
                    entry.size = len(data)
                    tar.addfile(entry, io.BytesIO(data))
    views = [
        transforms.RandomResizedCrop(SIZE, SCALE, RATIO),
        transforms.RandomHorizontalFlip(),
        transforms.ToTensor(),
    ]
    dataset = (
        webdataset.WebDataset(
            [str(path) for path in sorted(shards.glob("*.tar"))],
            shardshuffle=2 * WORKERS,
            empty_check=False,
        )
        .shuffle(100)
        .decode("pil")
        .to_tuple("jpg", "cls")
        .map_tuple(transforms.Compose(views), int)
        .batched(BATCH, partial=False)
    )
    return webdataset.WebLoader(dataset, batch_size=None, num_workers=WORKERS)
