"""The features of a frozen backbone, computed once: the epochs train the head on what is on disk.

Each training image is seen in a fixed number of random views, which the epochs take in turn; valid
in its plain view. The features of one split in one view are one file of float32 [images, width].
While it is being written, a second file says how many of its rows are safe on the disk.
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
from trainer.distributed.world import World
from trainer.images.loader import Batch, ImageLoader
from trainer.images.sampler import Share, epoch_batches, plain_batches
from trainer.network.build import Classifier
from trainer.network.device import Machine

# Images at a time, whatever the training's batch: features differ by about 1e-6 from one size to
# another.
BATCH = 64
SAVE_EVERY = 10.0  # seconds of work that a kill may cost


@dataclass(frozen=True)
class FeatureLoader:
    """As `ImageLoader`, with features, float32 [N, width], in the place of pixels."""

    loader: ImageLoader
    views: tuple[NDArray[np.float32], ...]  # of train
    valid: NDArray[np.float32]

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
        batches = epoch_batches(len(labels), self.loader.batch_size, self.loader.seed, epoch)
        features = self.views[epoch % len(self.views)]
        yield from _batches(features, labels, self.share.of_training(batches[first:]))

    def eval_batches(self, name: str) -> Generator[Batch, None, None]:
        assert name == "valid"
        labels = self.loader.folder.splits[name].labels
        batches = plain_batches(len(labels), self.loader.batch_size)
        yield from _batches(self.valid, labels, self.share.of_evaluation(batches))


def _batches(
    features: NDArray[np.float32], labels: NDArray[np.int64], batches: list[NDArray[np.int64]]
) -> Iterator[Batch]:
    for samples in batches:
        yield Batch(torch.from_numpy(features[samples]), torch.from_numpy(labels[samples]))


class FeatureCache:
    """The features of one frozen backbone for the images of one loader.

    They lie in a directory of their own below `cache`.
    """

    def __init__(
        self, network: Classifier, loader: ImageLoader, machine: Machine, cache: Path
    ) -> None:
        self.network, self.loader, self.machine = network, loader, machine
        self.directory = cache / "features" / _key(network, loader, machine.precision)

    def extract(self, stop: Stop, world: World) -> FeatureLoader:
        """Return the features of every training view and of valid.

        Those that are on the disk already are not computed again.
        The processes of a host begin at different views; what one of them computes, the others find
        or wait for. Raises Interrupted when asked to stop: what is done is kept, and the next call
        goes on from there.
        """
        views = self.loader.views
        assert views is not None
        self.directory.mkdir(parents=True, exist_ok=True)
        order: list[int | None] = [*range(views), None]
        first = len(order) * world.local_rank // world.local_size
        maps = {view: self._extract(view, stop) for view in order[first:] + order[:first]}
        world.barrier(stop)
        return FeatureLoader(self.loader, tuple(maps[view] for view in range(views)), maps[None])

    def _extract(self, view: int | None, stop: Stop) -> NDArray[np.float32]:
        """Return a read-only map of the file of one view (None: valid, plain): [images, width]."""
        name = "valid" if view is None else f"train-{view}"
        complete = self.directory / f"{name}.f32"
        if not complete.exists():
            with files.locked(self.directory, stop.check, f".lock-{name}"):
                if not complete.exists():  # another process may have made it meanwhile
                    self._write(view, complete, stop)
        shape = (self._count(view), self.network.features_width)
        return np.memmap(complete, np.float32, "r", shape=shape)

    def _count(self, view: int | None) -> int:
        return self.loader.folder.count("valid" if view is None else "train")

    def _write(self, view: int | None, complete: Path, stop: Stop) -> None:
        count, width = self._count(view), self.network.features_width
        partial, safe = complete.with_suffix(".partial"), complete.with_suffix(".rows")
        rows = int(safe.read_text()) if safe.exists() and partial.exists() else 0
        bar = ProgressBar(f"features, {complete.stem}", count, rows)
        with partial.open("r+b" if rows else "wb") as file, bar:
            file.truncate(rows * width * 4)
            file.seek(0, os.SEEK_END)
            saved = time.monotonic()
            for batch in self.loader.ordered_batches(view, BATCH, rows // BATCH):
                file.write(compute(self.network, batch, self.machine).tobytes())
                rows += len(batch.target)
                bar.advance(len(batch.target))
                if stop.reason or rows == count or time.monotonic() - saved > SAVE_EVERY:
                    file.flush()
                    os.fsync(file.fileno())
                    files.write(safe, str(rows))
                    saved = time.monotonic()
                    stop.check()
        partial.replace(complete)
        files.flush_directory(complete.parent)
        safe.unlink()


@torch.inference_mode()
def compute(network: Classifier, batch: Batch, machine: Machine) -> NDArray[np.float32]:
    """Return the features of at most BATCH images, float32 [N, width]."""
    network.eval()
    missing = BATCH - len(batch.image)
    # The last batch too is computed in the full shape.
    image = functional.pad(batch.image, (0, 0, 0, 0, 0, 0, 0, missing))
    with machine.autocast():
        features = network.features(image.to(machine.device, non_blocking=True))
    array: NDArray[np.float32] = features[: len(batch.image)].float().cpu().numpy()
    return array


def _key(network: Classifier, loader: ImageLoader, precision: torch.dtype) -> str:
    """Return a name for what the features are a function of.

    Weights, images, their views, and how they are computed.
    """
    digest = hashlib.sha256()
    for name, tensor in network.backbone.state_dict().items():
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
    paths = [path for split in loader.folder.splits.values() for path in split.paths]
    stats = [(path, Path(path).stat()) for path in paths]
    facts = {
        "preprocessing": asdict(loader.preprocessing),
        "augmentation": asdict(loader.augmentation),
        "normalisation": [network.mean.flatten().tolist(), network.std.flatten().tolist()],
        "seed": loader.seed,
        "precision": str(precision),
        "torch": torch.__version__,
        "pictures": [(path, stat.st_size, stat.st_mtime_ns) for path, stat in stats],
    }
    digest.update(json.dumps(facts).encode())
    return digest.hexdigest()[:24]
