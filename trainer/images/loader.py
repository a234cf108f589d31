"""Batches of pixels, read ahead by threads.

Decoding and resizing release the GIL, so worker processes would only copy.
"""

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
from trainer.common.threads import work_alone
from trainer.images.augment import Augmentation, mirror, random_view
from trainer.images.decode import ImageError, Preprocessing, center_crop
from trainer.images.folder import ImageFolder, read_shrunk
from trainer.images.sampler import (
    Share,
    balanced_order,
    epoch_batches,
    plain_batches,
    random_order,
)

AHEAD = 3  # batches in the making besides the one in use

# Views of an image: its random views have the numbers 0, 1, ...
PLAIN = -1  # as serving sees it
MIRRORED = -2  # the same, left and right swapped

# Takes an image's path and gives its shrunk pixels [H, W, 3]; raises ImageError.
Reader = Callable[[str], NDArray[np.uint8]]


class Batch(NamedTuple):
    """What a step is taken on, or an evaluation computes at a time."""

    # uint8 [N, size, size, 3], or features, float32 [N, width]; [N, views, width] where an
    # evaluation takes the mean over several views of each.
    image: Tensor
    target: Tensor  # classes, int64 [N]


def load(
    view: Callable[[int], NDArray[np.uint8]],
    target: NDArray[np.int64],
    batches: Sequence[NDArray[np.int64]],
    size: int,
    workers: int,
    pin: bool = False,
) -> Generator[Batch, None, None]:
    """Yield the batches in order, whatever the number of threads.

    view: a sample's number to its pixels [size, size, 3]; called from several threads. target: the
    class of each sample; numbers beyond them are samples that come again. workers: how many
    threads; 0: none, in the caller's own. pin: in page-locked memory, from which a GPU copies on
    its own.
    """

    def start(samples: NDArray[np.int64]) -> tuple[Batch, Callable[[int, int], None]]:
        image = torch.empty(len(samples), size, size, 3, dtype=torch.uint8, pin_memory=pin)
        rows = image.numpy()

        def fill(first: int, step: int) -> None:
            for row in range(first, len(samples), step):
                rows[row] = view(int(samples[row]))

        return Batch(image, torch.from_numpy(target[samples % len(target)])), fill

    if workers == 0:
        for samples in batches:
            batch, fill = start(samples)
            fill(0, 1)
            yield batch
        return
    pool = ThreadPoolExecutor(workers, "images", initializer=work_alone)
    try:
        pending: deque[tuple[Batch, list[Future[None]]]] = deque()
        for number in range(len(batches) + AHEAD):
            if number < len(batches):
                batch, fill = start(batches[number])
                pending.append((batch, [pool.submit(fill, n, workers) for n in range(workers)]))
            if number >= AHEAD and pending:
                batch, parts = pending.popleft()
                for part in parts:
                    part.result()
                yield batch
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


class Loader(Protocol):
    """What the loop needs of its data.

    Pixels (`ImageLoader`), or features (`network.features.FeatureLoader`).
    """

    @property
    def holds_features(self) -> bool:
        """Return whether the batches are features of a frozen backbone, and not pixels."""

    @property
    def classes(self) -> int:
        """Return how many classes there are."""

    @property
    def steps_per_epoch(self) -> int:
        """Return how many batches an epoch has."""

    @property
    def share(self) -> Share:
        """Return what this process computes of each batch."""

    @property
    def global_batch_size(self) -> int:
        """Return the images of a training batch, over all processes."""

    def train_batches(self, epoch: int, first: int = 0) -> Generator[Batch, None, None]:
        """Yield this process's share of an epoch's (0-based) batches, from number `first` on."""

    def eval_batches(self, name: str) -> Generator[Batch, None, None]:
        """Yield this process's share of a split's batches.

        Over all processes: every image once, in order, as serving sees it.
        """


@dataclass(frozen=True)
class ImageLoader:
    """The images of a run as batches: random views for training, plain ones for evaluation."""

    folder: ImageFolder
    preprocessing: Preprocessing
    augmentation: Augmentation
    batch_size: int
    seed: int
    workers: int
    pin: bool = False
    read: Reader | None = None  # None: decodes
    # Views of each image, which the epochs take in turn: the plain one, and random ones. None: each
    # epoch has a new random one.
    views: int | None = None
    share: Share = Share()  # noqa: RUF009 - frozen
    balanced: bool = False  # whether an epoch has as many images of each class

    @property
    def holds_features(self) -> bool:
        return False

    @property
    def classes(self) -> int:
        return len(self.folder.classes)

    @property
    def steps_per_epoch(self) -> int:
        return len(self.epoch(0))

    @property
    def global_batch_size(self) -> int:
        return min(self.batch_size, self.folder.count("train"))

    def train_batches(self, epoch: int, first: int = 0) -> Generator[Batch, None, None]:
        return self._load(
            "train", self.view_of(epoch), self.share.of_training(self.epoch(epoch)[first:])
        )

    def view_of(self, epoch: int) -> int:
        """Return the view of each image that an epoch (0-based) trains on.

        Of a fixed number of views the first one is the plain one: evaluation shows no other, and
        it is worth more than one more random view (docs/benchmarks.md, frozen backbone).
        """
        if self.views is None:
            return epoch
        return PLAIN + epoch % self.views  # PLAIN, 0, 1, ...

    def eval_batches(
        self, name: str, chosen: NDArray[np.int64] | None = None
    ) -> Generator[Batch, None, None]:
        """Yield this process's share of a split's batches, or of some of its images.

        chosen: their numbers.
        """
        count = self.folder.count(name)
        if chosen is not None:
            count = len(chosen)
        batches = plain_batches(count, self.batch_size)
        if chosen is not None:
            batches = [chosen[places] for places in batches]
        return self._load(name, PLAIN, self.share.of_evaluation(batches))

    def ordered_batches(
        self, name: str, view: int, batch_size: int, chosen: Sequence[int] | None = None
    ) -> Generator[Batch, None, None]:
        """Yield every image of a split in one view, each once and in order.

        chosen: the numbers of the batches; None: all.
        """
        batches = plain_batches(self.folder.count(name), batch_size)
        if chosen is not None:
            batches = [batches[number] for number in chosen]
        return self._load(name, view, batches)

    def epoch(self, epoch: int) -> list[NDArray[np.int64]]:
        """Return the numbers of the images of each batch, over all processes."""
        order = random_order(self.folder.count("train"), self.seed, epoch)
        if self.balanced:
            order = balanced_order(self.folder.splits["train"].labels, self.seed, epoch)
        return epoch_batches(order, self.batch_size)

    def _load(
        self, name: str, view: int, batches: list[NDArray[np.int64]]
    ) -> Generator[Batch, None, None]:
        split, size = self.folder.splits[name], self.preprocessing.size

        def see(sample: int) -> NDArray[np.uint8]:
            pixels = self._shrunk(split.paths[sample % len(split.paths)])
            if view == PLAIN:
                return center_crop(pixels, size)
            if view == MIRRORED:
                return mirror(center_crop(pixels, size))
            rng = generator(Purpose.VIEW, self.seed, view, sample)
            return random_view(
                pixels, size, self.preprocessing.interpolation, self.augmentation, rng
            )

        return load(see, split.labels, batches, size, self.workers, self.pin)

    def _shrunk(self, path: str) -> NDArray[np.uint8]:
        try:
            if self.read:
                return self.read(path)
            return read_shrunk(path, self.preprocessing.resize, self.preprocessing.interpolation)
        except ImageError as error:  # it was readable when the run began
            raise UserError(
                f"{path}: the picture can no longer be read ({error}); was it moved or changed? "
                "start the same command again"
            ) from error
