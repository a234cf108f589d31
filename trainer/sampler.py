"""The order of the training pictures: a pure function of (seed, epoch), so that nothing about it needs saving."""

import numpy as np
from numpy.typing import NDArray

from trainer.randomness import Purpose, generator


def epoch_batches(count: int, batch_size: int, seed: int, epoch: int) -> list[NDArray[np.int64]]:
    """The batches of one epoch: sample numbers, each array [batch_size].

    A rest that fills no batch is left out (another one each epoch, since the order changes): BatchNorm would take noisy statistics
    from it. Where there are fewer pictures than one batch, they are the batch.
    """
    order = generator(Purpose.ORDER, seed, epoch).permutation(count).astype(np.int64)
    full = max(count // batch_size, 1)
    return [order[i * batch_size : (i + 1) * batch_size] for i in range(full)]


def plain_batches(count: int, batch_size: int) -> list[NDArray[np.int64]]:
    """Every sample once, in order, for evaluation; the last batch may be smaller."""
    order = np.arange(count, dtype=np.int64)
    return [order[start : start + batch_size] for start in range(0, count, batch_size)]
