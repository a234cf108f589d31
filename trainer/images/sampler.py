"""The order of the training images: a pure function of (seed, epoch), so it needs no saving."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Self

import numpy as np
from numpy.typing import NDArray

from trainer.common.randomness import Purpose, generator


def random_order(count: int, seed: int, epoch: int) -> NDArray[np.int64]:
    """Return the sample numbers 0..count - 1 in the order of an epoch."""
    return generator(Purpose.ORDER, seed, epoch).permutation(count).astype(np.int64)


def balanced_order(labels: NDArray[np.int64], seed: int, epoch: int) -> NDArray[np.int64]:
    """Return an order of as many samples, of which each class has the same number, but for one.

    Of a large class these are some of its samples, others each epoch. Those of a small one come
    again only when all have come; each time it comes again a number is larger by len(labels), so
    that it can be told apart, and be seen in another view.
    """
    rng = generator(Purpose.ORDER, seed, epoch)
    classes = rng.permutation(np.unique(labels))
    each, rest = divmod(len(labels), len(classes))
    chosen = []
    for place, label in enumerate(classes):
        own, wanted = np.flatnonzero(labels == label), each + (place < rest)
        rounds = range(-(-wanted // len(own)))
        repeated = [rng.permutation(own) + round_ * len(labels) for round_ in rounds]
        chosen.append(np.concatenate(repeated)[:wanted])
    return rng.permutation(np.concatenate(chosen)).astype(np.int64)


def epoch_batches(order: NDArray[np.int64], batch_size: int) -> list[NDArray[np.int64]]:
    """Return the batches of one epoch: sample numbers, each array int64 [batch_size].

    A rest that fills no batch is left out (another one each epoch, since the order changes):
    BatchNorm would take noisy statistics from it. Where there are fewer images than one batch,
    they are the batch.
    """
    full = max(len(order) // batch_size, 1)
    return [order[i * batch_size : (i + 1) * batch_size] for i in range(full)]


def plain_batches(count: int, batch_size: int) -> list[NDArray[np.int64]]:
    """Return every sample once, in order, for evaluation; the last batch may be smaller."""
    order = np.arange(count, dtype=np.int64)
    return [order[start : start + batch_size] for start in range(0, count, batch_size)]


@dataclass(frozen=True)
class Share:
    """What process `rank` of `size` computes.

    That is some of the shards that each training batch is divided into, and every size-th batch of
    an evaluation. Shards are contiguous, and their lengths differ by one at most; so are the
    processes' parts, and the numbers of their shards.
    """

    rank: int = 0
    size: int = 1
    shards: int = 1  # of a batch; at least `size`

    @property
    def mine(self) -> range:
        """The numbers of this process's shards."""
        each, rest = divmod(self.shards, self.size)
        first = self.rank * each + min(self.rank, rest)
        return range(first, first + each + (self.rank < rest))

    def everybody(self) -> list[Self]:
        """Return the shares of all processes, by rank."""
        return [replace(self, rank=rank) for rank in range(self.size)]

    def lengths(self, count: int) -> list[int]:
        """Return how many of a batch's `count` images each of this process's shards has."""
        each, rest = divmod(count, self.shards)
        return [each + (shard < rest) for shard in self.mine]

    def of_training(self, batches: Sequence[NDArray[np.int64]]) -> list[NDArray[np.int64]]:
        """Return this process's part of each training batch."""
        if self.size == 1:
            return [*batches]
        return [
            np.concatenate([np.array_split(batch, self.shards)[shard] for shard in self.mine])
            for batch in batches
        ]

    def of_evaluation(self, batches: Sequence[NDArray[np.int64]]) -> list[NDArray[np.int64]]:
        """Return the batches of an evaluation that this process computes."""
        return list(batches[self.rank :: self.size])
