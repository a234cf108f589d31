"""The features of a frozen backbone, computed once and kept on disk; epochs train the head on them.

Each training image has features in a fixed number of random views, which the epochs take in turn.
Valid has them in its plain view, and mirrored where the network averages both. One file holds the
features of a split in one view, float32 [images, width]. A second file holds the checksums of its
blocks, each written when its block is safe on the disk. A block that doesn't match its checksum is
computed again; at first that is every block.

Where the processor multiplies in bfloat16, the features of train are computed in it, if the
rounding hardly changes them for these pictures and this network. Those of valid are always computed
as the network will be served, so no metric comes from rounded features.
"""

import copy
import hashlib
import json
import math
import os
import time
import zlib
from collections.abc import Generator, Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from io import FileIO
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from numpy.typing import NDArray

from trainer.common import files, journal
from trainer.common.command import one_line
from trainer.common.console import ProgressBar, log
from trainer.common.interrupt import Stop
from trainer.common.streams import FULL
from trainer.distributed.world import World
from trainer.images import augment, cache, identity
from trainer.images.loader import MIRRORED, PLAIN, Batch, ImageLoader
from trainer.images.sampler import Share, plain_batches
from trainer.network import build
from trainer.network.build import Classifier
from trainer.network.device import Machine

FORMAT = 4  # of the files; 1 had no checksums, 2 other names, 3 a last block that was padded
NAMES = {PLAIN: "plain", MIRRORED: "mirrored"}  # of the views that aren't random
# Images at a time, whatever the training's batch size: features differ by about 1e-6 between batch
# sizes. The last block has the rest; its size too depends on the pictures alone.
BATCH = 64
SAVE_EVERY = 10.0  # seconds of work that a kill may cost
# The share of the features' variance between pictures that may be rounding. At 0.9 % (the most that
# was found: MobileNetV2 in bfloat16) a probe's loss on other pictures changes by at most 0.013
# (pets37, clothes); a random crop of [0.25,1] moves the features by 52 to 78 % (64 of pets37).
ROUNDING = 0.02


@dataclass(frozen=True)
class FeatureLoader:
    """Loads as `ImageLoader` does, but features, float32 [N, width], instead of pixels."""

    loader: ImageLoader
    views: tuple[NDArray[np.float32], ...]  # of train
    valid: NDArray[np.float32]
    mirrored: NDArray[np.float32] | None = None  # of valid; None: use the plain view alone
    cache: "FeatureCache | None" = None  # that the features come from

    @property
    def holds_features(self) -> bool:
        return True

    @property
    def classes(self) -> int:
        return self.loader.classes

    @property
    def steps_per_epoch(self) -> int:
        return self.loader.steps_per_epoch

    @property
    def share(self) -> Share:
        return self.loader.share

    @property
    def global_batch_size(self) -> int:
        return self.loader.global_batch_size

    def train_batches(self, epoch: int, first: int = 0) -> Generator[Batch, None, None]:
        labels = self.loader.folder.splits["train"].labels
        batches = self.loader.epoch(epoch)
        features = self.views[epoch % len(self.views)]
        yield from _batches(features, labels, self.share.of_training(batches[first:]))

    def eval_batches(self, name: str) -> Generator[Batch, None, None]:
        assert name == "valid"
        labels = self.loader.folder.splits[name].labels
        batches = plain_batches(len(labels), self.loader.batch_size)
        batches = self.share.of_evaluation(batches)
        if self.mirrored is None:
            yield from _batches(self.valid, labels, batches)
            return
        plain, mirrored = (_batches(each, labels, batches) for each in (self.valid, self.mirrored))
        for batch, other in zip(plain, mirrored, strict=True):
            yield Batch(torch.stack([batch.image, other.image], dim=1), batch.target)


def _batches(
    features: NDArray[np.float32], labels: NDArray[np.int64], batches: list[NDArray[np.int64]]
) -> Iterator[Batch]:
    for samples in batches:
        places = samples % len(labels)  # see `sampler.balanced_order`
        yield Batch(torch.from_numpy(features[places]), torch.from_numpy(labels[places]))


class FeatureCache:
    """The features of one frozen backbone for the images of one loader.

    They lie in a directory of their own below `cache`.
    """

    def __init__(
        self, network: Classifier, loader: ImageLoader, machine: Machine, cache: Path
    ) -> None:
        self.network, self.loader, self.machine = network, loader, machine
        self.cache = cache / "features"
        self._weights = build.identity(network)
        self._of_train: Machine | None = None  # computes train; None: not chosen yet
        self._why = ""  # why that machine was chosen, in words

    def of_other(self, loader: ImageLoader) -> "FeatureCache":
        """Return the cache of the same network for other images, or other views of them."""
        other = copy.copy(self)
        other.loader = loader
        return other

    def tell(self) -> None:
        """Log the precision of train's features, where there was a choice."""
        if self._why:
            log.info("features of train: %s", self._why)

    def extract(self, stop: Stop, world: World) -> FeatureLoader:
        """Return the features of every training view and of valid.

        Only those that are not on the disk are computed. The processes of a host begin at different
        views; what one of them computes, the others find or wait for. Where the directory can't be
        used, the features are kept in memory, and the next run computes them again. Raises
        Interrupted when asked to stop: the features so far are kept, and the next call goes on from
        there.
        """
        views = self.loader.views
        assert views is not None
        seen = [self.loader.view_of(epoch) for epoch in range(views)]
        order = [*(("train", view) for view in seen), ("valid", PLAIN)]
        if self.network.averages_flip:
            order.append(("valid", MIRRORED))
        first = len(order) * world.local_rank // world.local_size
        arrays = {each: self.of(*each, stop) for each in order[first:] + order[:first]}
        world.barrier(stop)
        return FeatureLoader(
            self.loader,
            tuple(arrays["train", view] for view in seen),
            arrays["valid", PLAIN],
            arrays.get(("valid", MIRRORED)),
            self,
        )

    def of(self, split: str, view: int, stop: Stop) -> NDArray[np.float32]:
        """Return the features of a split in one view: float32 [images, width].

        Raises Interrupted, as `extract`.
        """
        machine = self.machine
        if split == "train":
            machine = self._of_train = self._of_train or self._harmless(stop)
        return self._computed_by(machine, split, view, self.loader.folder.count(split), stop)

    def _harmless(self, stop: Stop) -> Machine:
        """Return the machine for train: in the lower precision, where rounding changes little.

        The change is measured on the first block of valid.
        """
        quick = self.machine.for_frozen()
        if quick.precision == self.machine.precision:
            return self.machine
        count = min(BATCH, self.loader.folder.count("valid"))
        exact, rounded = (
            self._computed_by(machine, "valid", PLAIN, count, stop)
            for machine in (self.machine, quick)
        )
        noise = np.square(rounded - exact).sum()
        share = float(noise / max(np.square(exact - exact.mean(0)).sum(), 1e-30))
        words = f"rounding to {quick} is {share:.1%} of what sets the pictures apart"
        chosen = quick
        if share > ROUNDING:
            chosen = self.machine
        self._why = f"in {chosen}; {words}"
        return chosen

    def _computed_by(
        self, machine: Machine, split: str, view: int, count: int, stop: Stop
    ) -> NDArray[np.float32]:
        """Return the features of a split's first images in one view: float32 [count, width]."""
        name = f"{split}-{NAMES.get(view, view)}"
        facts = _facts(self.network, self.loader, machine.precision, view)
        directory = self.cache / _key(facts | {"weights": self._weights})
        shape = (count, self.network.features_width)
        numbers = range(math.ceil(shape[0] / BATCH))
        told = f"features of {split}, {NAMES.get(view, f'view {view + 1}')}"
        with ProgressBar(told, shape[0]) as bar:
            try:
                directory.mkdir(parents=True, exist_ok=True)
                with (
                    files.locked(directory, stop.check, f".lock-{name}"),
                    _Blocks(directory / name, shape) as blocks,
                ):
                    missing = [number for number in numbers if not blocks.is_right(number, bar)]
                    for number, rows in self._blocks(machine, split, view, missing, stop, bar):
                        blocks.write(number, rows)
                    return blocks.mapped()
            except OSError as error:
                if error.errno in FULL:
                    raise
                log.warning("%s: kept in memory only: %s", told, one_line(error) or error)
            features = np.empty(shape, np.float32)
            bar.advance(-bar.done)
            for number, rows in self._blocks(machine, split, view, numbers, stop, bar):
                features[number * BATCH : number * BATCH + len(rows)] = rows
            return features

    def _blocks(
        self,
        machine: Machine,
        split: str,
        view: int,
        numbers: Sequence[int],
        stop: Stop,
        bar: ProgressBar,
    ) -> Iterator[tuple[int, NDArray[np.float32]]]:
        """Yield each of these blocks and its features, float32 [at most BATCH, width]."""
        batches = self.loader.ordered_batches(split, view, BATCH, numbers)
        for number, batch in zip(numbers, batches, strict=True):
            yield number, compute(self.network, batch, machine)
            bar.advance(len(batch.target))
            stop.check()


class _Blocks:
    """The file of one view, for the process that has locked it; a block has BATCH rows.

    shape: [images, width]. All written blocks are safe on the disk when the context ends.
    """

    def __init__(self, place: Path, shape: tuple[int, int]) -> None:
        self._shape = shape
        self._path = place.with_suffix(".f32")
        self._pending: list[tuple[int, int]] = []
        self._saved = time.monotonic()
        self._files = ExitStack()

    def __enter__(self) -> Self:
        with ExitStack() as opened:
            self._data = opened.enter_context(_opened(self._path))
            self._sums = opened.enter_context(_opened(self._path.with_suffix(".sums")))
            written, self._whole = journal.parse(self._sums.readall(), int, int)
            self._files = opened.pop_all()
        self._checksums: dict[int, int] = dict(written)
        return self

    def __exit__(self, *error: object) -> None:
        with self._files:
            self._save()

    def is_right(self, number: int, bar: ProgressBar) -> bool:
        """Return whether a block matches its checksum; if so, count its rows as done."""
        start = number * BATCH
        rows = min(BATCH, self._shape[0] - start)
        size, offset = rows * self._row, start * self._row
        checksum = self._checksums.get(number)
        if checksum is None:
            return False
        data = os.pread(self._data.fileno(), size, offset)
        if len(data) != size or zlib.crc32(data) != checksum:
            return False
        bar.advance(rows)
        return True

    def write(self, number: int, rows: NDArray[np.float32]) -> None:
        """Write a block, float32 [at most BATCH, width]."""
        files.write_at(self._data.fileno(), rows.data, number * BATCH * self._row, self._path)
        self._pending.append((number, zlib.crc32(rows.data)))
        if time.monotonic() - self._saved > SAVE_EVERY:
            self._save()

    def mapped(self) -> NDArray[np.float32]:
        """Return the features, read-only: float32 [images, width]."""
        return np.memmap(self._data, np.float32, "r", shape=self._shape)

    @property
    def _row(self) -> int:
        return self._shape[1] * np.dtype(np.float32).itemsize

    def _save(self) -> None:
        """Flush the written blocks to the disk, then their checksums."""
        self._saved = time.monotonic()
        if not self._pending:
            return
        files.sync(self._data.fileno())
        self._checksums.update(self._pending)
        values: Iterable[tuple[int, int]] = self._pending
        if not self._whole:
            self._sums.truncate(0)
            values = self._checksums.items()
        sums = self._sums.fileno()
        end = os.fstat(sums).st_size
        files.write_at(sums, journal.lines(values), end, self._path, flush=True)
        self._whole = True
        self._pending = []


def _opened(path: Path) -> FileIO:
    return FileIO(os.open(path, os.O_RDWR | os.O_CREAT, 0o666), "r+")


@torch.inference_mode()
def compute(network: Classifier, batch: Batch, machine: Machine) -> NDArray[np.float32]:
    """Return the features of a batch of images, float32 [N, width]."""
    network.eval()
    with machine.autocast():
        features = network.features(batch.image.to(machine.device, non_blocking=True))
    rows = features.float().cpu()
    array: NDArray[np.float32] = rows.contiguous().numpy()  # a ViT's are a view of one token
    return array


def _key(facts: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:24]


def _facts(
    network: Classifier, loader: ImageLoader, precision: torch.dtype, view: int
) -> dict[str, Any]:
    """Return what the features depend on, except the weights.

    That is the images, their views, and how they are computed. All random views have the same
    facts.
    """
    random: dict[str, Any] = {}
    if view not in NAMES:
        random["augmentation"] = [cache.code_of(augment), asdict(loader.augmentation)]
        random["seed"] = loader.seed
    samples = [sample[:3] for sample in identity.samples(loader.folder) if sample[0] != "test"]
    return {
        "format": FORMAT,
        "pictures": samples,
        "preprocessing": [cache.decoding(), asdict(loader.preprocessing)],
        "normalisation": [network.mean.flatten().tolist(), network.std.flatten().tolist()],
        "precision": str(precision),
        "torch": torch.__version__,
        **random,
    }
