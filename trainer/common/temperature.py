"""The temperature of logits: the one under which the given labels are most likely.

Guo et al., "On calibration of modern neural networks", ICML 2017. NumPy only. A copy travels in the
package, so training compares losses at the same temperature at which probabilities are served.
"""

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

# A prior worth CAUTION pictures at temperature 1: without it, some draws of 37 pictures give half
# the temperature of others.
LEAST, MOST, CAUTION = 0.05, 20.0, 2.0
STEPS = 24  # halvings of the interval of its logarithm, to 4e-7
MANY = 10_000  # pictures, evenly spread, to fit it; more would not change it


def optimum(
    logits: NDArray[np.float64], labels: NDArray[np.int64], caution: float = CAUTION
) -> float:
    """Return the temperature with the least loss, of logits [N, classes] and labels [N].

    caution: 0 where networks are compared, so that their confidence doesn't count. With b = 1 /
    temperature the loss of b * logits + caution * (b - log b) is convex; bisection finds its
    minimum.
    """
    step = -(-len(labels) // MANY) or 1
    logits, labels = logits[::step], labels[::step]
    own = logits[np.arange(len(labels)), labels]

    def falls(inverse: float) -> bool:
        expected = (softmax(logits * inverse) * logits).sum(axis=1)
        return float((expected - own).sum()) + caution * (1 - 1 / inverse) < 0

    low, high = math.log(1 / MOST), math.log(1 / LEAST)
    for _ in range(STEPS):
        middle = (low + high) / 2
        if falls(math.exp(middle)):
            low = middle
        else:
            high = middle
    return math.exp(-(low + high) / 2)


def losses(logits: NDArray[np.float64], labels: NDArray[np.int64]) -> NDArray[np.float64]:
    """Return the negative log likelihood of each label [N] by logits [N, classes]."""
    shifted = logits - logits.max(axis=1, keepdims=True)
    own = shifted[np.arange(len(labels)), labels]
    each: NDArray[np.float64] = np.log(np.exp(shifted).sum(axis=1)) - own
    return each


def softmax(logits: NDArray[np.floating[Any]]) -> NDArray[np.float64]:
    """Return the probabilities of logits [N, classes]."""
    powers: NDArray[np.float64] = np.exp(
        logits - logits.max(axis=1, keepdims=True, initial=-np.inf), dtype=np.float64
    )
    powers /= powers.sum(axis=1, keepdims=True)
    return powers
