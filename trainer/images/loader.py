"""Batches of pixels, read ahead by threads: decoding and resizing release the GIL, so worker processes would only copy."""

from collections import deque
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from trainer.common.errors import UserError
from trainer.common.randomness import Purpose, generator
from trainer.images.augment import Augmentation, random_view
from trainer.images.decode import ImageError, Preprocessing, center_crop
from trainer.images.folder import ImageFolder, read_shrunk
from trainer.images.sampler import Share, epoch_batches, plain_batches

AHEAD = 3  # batches in the making besides the one in use


Reader = Callable[
    [str], NDArray[np.uint8]
]  # a picture's path to its shrunk pixels [H, W, 3]; raises ImageError


class Batch(NamedTuple):
    pixels: Tensor  # uint8 [N, size, size, 3]
    labels: Tensor  # int64 [N]


def load(
    view: Callable[[int], NDArray[np.uint8]],
    labels: NDArray[np.int64],
    batches: Sequence[NDArray[np.int64]],
    size: int,
    workers: int,
    pin: bool = False,
) -> Generator[Batch, None, None]:
    """Yields the batches in order, whatever the number of threads.

    view: a sample's number to its pixels [size, size, 3]; called from several threads. workers: how many; 0: none, in the caller's own.
    pin: in page-locked memory, from which a GPU copies on its own.
    """

    def start(
        samples: NDArray[np.int64], submit: Callable[..., Future[None]] | None
    ) -> tuple[Batch, list[Future[None]]]:
        pixels = torch.empty(len(samples), size, size, 3, dtype=torch.uint8, pin_memory=pin)
        rows = pixels.numpy()

        def fill(first: int, step: int) -> None:
            for row in range(first, len(samples), step):
                rows[row] = view(int(samples[row]))

        batch = Batch(pixels, torch.from_numpy(labels[samples]))
        if submit is None:
            fill(0, 1)
            return batch, []
        return batch, [submit(fill, first, workers) for first in range(workers)]

    if workers == 0:
        for samples in batches:
            yield start(samples, None)[0]
        return
    pool = ThreadPoolExecutor(workers, thread_name_prefix="pictures")
    try:
        pending: deque[tuple[Batch, list[Future[None]]]] = deque()
        for number in range(len(batches) + AHEAD):
            if number < len(batches):
                pending.append(start(batches[number], pool.submit))
            if number >= AHEAD and pending:
                batch, parts = pending.popleft()
                for part in parts:
                    part.result()
                yield batch
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


class Batches(Protocol):
    """What the loop needs of its pictures, whether they come as pixels (`ImageLoader`) or as features (`features.FeatureLoader`)."""

    @property
    def classes(self) -> int: ...

    @property
    def steps_per_epoch(self) -> int: ...

    @property
    def share(self) -> Share:
        """What this process computes of each batch."""

    @property
    def global_batch_size(self) -> int:
        """Pictures of a training batch, over all processes."""

    def train_batches(self, epoch: int, first: int = 0) -> Generator[Batch, None, None]:
        """This process's share of an epoch's (0-based) batches, from number `first` on."""

    def eval_batches(self, name: str) -> Generator[Batch, None, None]:
        """This process's share of a split's batches, which hold every picture once, in order, as serving sees it."""


@dataclass(frozen=True)
class ImageLoader:
    """The pictures of a run as batches: random views for training, plain ones for evaluation."""

    folder: ImageFolder
    preprocessing: Preprocessing
    augmentation: Augmentation
    batch_size: int
    seed: int
    workers: int
    pin: bool = False
    read: Reader | None = None  # None: decodes
    views: int | None = (
        None  # random views of each picture, which the epochs take in turn; None: a new one each epoch
    )
    share: Share = Share()  # noqa: RUF009 - frozen

    @property
    def classes(self) -> int:
        return len(self.folder.classes)

    @property
    def steps_per_epoch(self) -> int:
        return len(
            epoch_batches(len(self.folder.splits["train"].paths), self.batch_size, self.seed, 0)
        )

    @property
    def global_batch_size(self) -> int:
        return min(self.batch_size, len(self.folder.splits["train"].paths))

    def train_batches(self, epoch: int, first: int = 0) -> Generator[Batch, None, None]:
        batches = epoch_batches(
            len(self.folder.splits["train"].paths), self.batch_size, self.seed, epoch
        )
        return self._load(
            "train",
            epoch % self.views if self.views else epoch,
            self.share.of_training(batches[first:]),
        )

    def eval_batches(self, name: str) -> Generator[Batch, None, None]:
        return self._load(
            name,
            None,
            self.share.of_evaluation(
                plain_batches(len(self.folder.splits[name].paths), self.batch_size)
            ),
        )

    def ordered_batches(
        self, view: int | None, batch_size: int, first: int = 0
    ) -> Generator[Batch, None, None]:
        """Every picture of train in one of its random views, or (None) of valid in its plain one, once and in order, from batch `first` on."""
        name = "valid" if view is None else "train"
        return self._load(
            name, view, plain_batches(len(self.folder.splits[name].paths), batch_size)[first:]
        )

    def _load(
        self, name: str, view: int | None, batches: list[NDArray[np.int64]]
    ) -> Generator[Batch, None, None]:
        split, size, interpolation = (
            self.folder.splits[name],
            self.preprocessing.size,
            self.preprocessing.interpolation,
        )

        def see(sample: int) -> NDArray[np.uint8]:
            pixels = self._shrunk(split.paths[sample])
            if view is None:
                return center_crop(pixels, size)
            return random_view(
                pixels,
                size,
                interpolation,
                self.augmentation,
                generator(Purpose.VIEW, self.seed, view, sample),
            )

        return load(see, split.labels, batches, size, self.workers, self.pin)

    def _shrunk(self, path: str) -> NDArray[np.uint8]:
        try:
            return (
                self.read(path)
                if self.read
                else read_shrunk(path, self.preprocessing.resize, self.preprocessing.interpolation)
            )
        except ImageError as error:  # it was readable when the run began
            raise UserError(
                f"{path}: the picture can no longer be read ({error}); was it moved or changed? start the same command again"
            ) from error
