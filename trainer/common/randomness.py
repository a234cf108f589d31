"""Random numbers as pure functions of what they are for.

So nothing about them needs saving, and no order of calls matters.
"""

from enum import IntEnum

import numpy as np


class Purpose(IntEnum):
    """Streams that must never share numbers."""

    ORDER = 0  # of the training images, by epoch
    VIEW = 1  # augmentation, by epoch and sample
    MIX = 2  # mixup and CutMix, by step
    FOLDS = 3  # of the images, for a probe


def generator(purpose: Purpose, seed: int, epoch: int = 0, sample: int = 0) -> np.random.Generator:
    """Return the random numbers for one purpose, epoch and sample (or step).

    Philox (Salmon et al. 2011) is counter-based: the key (seed, epoch, sample) and the counter's
    top word (purpose) select the stream, so a new generator costs about 10 us and no two streams
    overlap for seed < 2^64, epoch < 2^24 and sample < 2^40.
    """
    assert epoch < 1 << 24 and sample < 1 << 40, (epoch, sample)
    return np.random.Generator(
        np.random.Philox(
            key=np.array([seed, epoch << 40 | sample], np.uint64),
            counter=np.array([0, 0, 0, purpose], np.uint64),
        )
    )
