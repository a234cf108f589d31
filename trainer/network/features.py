"""The features of a frozen backbone, computed once: the epochs train the head on what is on disk.

Each training picture is seen in a fixed number of random views, which the epochs take in turn; valid in its plain view. The features of one split in
one view are one file of float32 [pictures, features]. While it is being written, a second file says how many of its rows are safe on the disk.
"""

import hashlib
import json
import os
import time
from collections.abc import Generator, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn import functional

from trainer.common import files
from trainer.common.console import ProgressBar
from trainer.common.interrupt import Stop
from trainer.distributed.job import ALONE, World
from trainer.images.loader import Batch, ImageLoader
from trainer.images.sampler import Share, epoch_batches, plain_batches
from trainer.network.build import Classifier
from trainer.training.loop import autocast

BATCH = 64  # pictures at a time, whatever the training's batch: features differ by about 1e-6 from one batch size to another
SAFE_EVERY = 10.0  # seconds of work that a kill may cost


@dataclass(frozen=True)
class FeatureLoader:
    """As `ImageLoader`, with features, float32 [N, features], in the place of pixels."""

    feed: ImageLoader
    views: tuple[NDArray[np.float32], ...]  # of train
    valid: NDArray[np.float32]

    @property
    def classes(self) -> int:
        return self.feed.classes

    @property
    def steps_per_epoch(self) -> int:
        return self.feed.steps_per_epoch

    @property
    def share(self) -> Share:
        return self.feed.share

    @property
    def global_batch_size(self) -> int:
        return self.feed.global_batch_size

    def train_batches(self, epoch: int, first: int = 0) -> Generator[Batch, None, None]:
        labels = self.feed.folder.splits["train"].labels
        batches = epoch_batches(len(labels), self.feed.batch_size, self.feed.seed, epoch)[first:]
        yield from _batches(
            self.views[epoch % len(self.views)], labels, self.feed.share.of_training(batches)
        )

    def eval_batches(self, name: str) -> Generator[Batch, None, None]:
        assert name == "valid"
        labels = self.feed.folder.splits[name].labels
        yield from _batches(
            self.valid,
            labels,
            self.feed.share.of_evaluation(plain_batches(len(labels), self.feed.batch_size)),
        )


def _batches(
    features: NDArray[np.float32], labels: NDArray[np.int64], batches: list[NDArray[np.int64]]
) -> Iterator[Batch]:
    for samples in batches:
        yield Batch(torch.from_numpy(features[samples]), torch.from_numpy(labels[samples]))


def extract(
    network: Classifier,
    feed: ImageLoader,
    cache: Path,
    device: torch.device,
    precision: torch.dtype,
    stop: Stop,
    world: World = ALONE,
) -> FeatureLoader:
    """The features of every training view and of valid; those that are in `cache` already are not computed again.

    The processes of a host begin at different views; what one of them computes, the others find or wait for. Raises Interrupted when asked
    to stop: what is done is kept, and the next call goes on from there.
    """
    assert feed.views is not None
    directory = cache / "features" / _key(network, feed, precision)
    directory.mkdir(parents=True, exist_ok=True)
    order: list[int | None] = [*range(feed.views), None]
    first = len(order) * world.local_rank // world.local_size
    maps = {
        view: _extract(network, feed, view, directory, device, precision, stop)
        for view in order[first:] + order[:first]
    }
    return FeatureLoader(feed, tuple(maps[view] for view in range(feed.views)), maps[None])


def _extract(
    network: Classifier,
    feed: ImageLoader,
    view: int | None,
    directory: Path,
    device: torch.device,
    precision: torch.dtype,
    stop: Stop,
) -> NDArray[np.float32]:
    """One split in one view (None: valid, plain): a read-only map of its file, [pictures, features]."""
    name = "valid" if view is None else f"train-{view}"
    count = len(feed.folder.splits["valid" if view is None else "train"].paths)
    complete = directory / f"{name}.f32"
    if not complete.exists():
        with files.locked(directory, stop.check, f".lock-{name}"):
            if not complete.exists():  # another process may have made it meanwhile
                _write(network, feed, view, complete, device, precision, stop)
    return np.memmap(complete, np.float32, "r", shape=(count, network.features_width))


def _write(
    network: Classifier,
    feed: ImageLoader,
    view: int | None,
    complete: Path,
    device: torch.device,
    precision: torch.dtype,
    stop: Stop,
) -> None:
    count, width = (
        len(feed.folder.splits["valid" if view is None else "train"].paths),
        network.features_width,
    )
    partial, safe = complete.with_suffix(".partial"), complete.with_suffix(".rows")
    rows = int(safe.read_text()) if safe.exists() and partial.exists() else 0
    batches = feed.ordered_batches(view, BATCH, rows // BATCH)
    with (
        partial.open("r+b" if rows else "wb") as file,
        ProgressBar(f"features, {complete.stem}", count, rows) as bar,
    ):
        file.truncate(rows * width * 4)
        file.seek(0, os.SEEK_END)
        saved = time.monotonic()
        for batch in batches:
            file.write(compute(network, batch, device, precision).tobytes())
            rows += len(batch.labels)
            bar.advance(len(batch.labels))
            if stop.reason or rows == count or time.monotonic() - saved > SAFE_EVERY:
                file.flush()
                os.fsync(file.fileno())
                files.write(safe, str(rows))
                saved = time.monotonic()
                stop.check()
    partial.replace(complete)
    files.flush_directory(complete.parent)
    safe.unlink()


@torch.inference_mode()
def compute(
    network: Classifier, batch: Batch, device: torch.device, precision: torch.dtype
) -> NDArray[np.float32]:
    """The features of at most BATCH pictures, float32 [N, features]."""
    network.eval()
    missing = BATCH - len(batch.pixels)
    pixels = functional.pad(
        batch.pixels, (0, 0, 0, 0, 0, 0, 0, missing)
    )  # the last batch too is computed in the full shape
    with autocast(device, precision):
        features = network.features(pixels.to(device, non_blocking=True))
    array: NDArray[np.float32] = features[: len(batch.pixels)].float().cpu().numpy()
    return array


def _key(network: Classifier, feed: ImageLoader, precision: torch.dtype) -> str:
    """Names what the features are a function of: weights, pictures, their views, and how they are computed."""
    digest = hashlib.sha256()
    for name, tensor in network.backbone.state_dict().items():
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
    stats = [
        (path, Path(path).stat()) for split in feed.folder.splits.values() for path in split.paths
    ]
    facts = {
        "preprocessing": asdict(feed.preprocessing),
        "augmentation": asdict(feed.augmentation),
        "normalisation": [network.mean.flatten().tolist(), network.std.flatten().tolist()],
        "seed": feed.seed,
        "precision": str(precision),
        "torch": torch.__version__,
        "pictures": [(path, stat.st_size, stat.st_mtime_ns) for path, stat in stats],
    }
    digest.update(json.dumps(facts).encode())
    return digest.hexdigest()[:24]
