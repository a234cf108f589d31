"""Confident learning as published: Northcutt, Jiang, Chuang, JAIR 70 (2021), 1373-1411.

Read aloud from the paper (section 3), to compare with: `by_noise_rate` answered as cleanlab 2.9.0
did (`filter_by="prune_by_noise_rate"`) on 370 photos of 37 classes with 18 wrong labels.
"""

import numpy as np
from numpy.typing import NDArray

Labels = NDArray[np.int64]


def confident(
    probabilities: NDArray[np.float64], labels: Labels
) -> tuple[Labels, NDArray[np.bool_]]:
    """The class that each image is confidently counted to (equation 1), and whether it has one."""
    classes = probabilities.shape[1]
    thresholds = np.array([probabilities[labels == j, j].mean() for j in range(classes)])
    above = probabilities >= thresholds
    best = np.where(above, probabilities, -1).argmax(axis=1)
    return best, above.any(axis=1)


def off_diagonal(probabilities: NDArray[np.float64], labels: Labels) -> NDArray[np.bool_]:
    """Images off the diagonal of the confident joint."""
    best, counted = confident(probabilities, labels)
    return counted & (best != labels)


def joint(probabilities: NDArray[np.float64], labels: Labels) -> NDArray[np.float64]:
    """How many images of each given class are of each true class (equation 3), float [C, C]."""
    classes = probabilities.shape[1]
    best, counted = confident(probabilities, labels)
    counts = np.zeros((classes, classes))
    np.add.at(counts, (labels[counted], best[counted]), 1)
    np.fill_diagonal(counts, np.maximum(counts.diagonal(), 1))
    given = np.bincount(labels, minlength=classes)
    return counts / counts.sum(axis=1, keepdims=True) * given[:, None]


def by_noise_rate(probabilities: NDArray[np.float64], labels: Labels) -> NDArray[np.bool_]:
    """Of each pair of classes as many as the joint says, the largest margins first."""
    numbers = np.rint(joint(probabilities, labels)).astype(int)
    flagged = np.zeros(len(labels), bool)
    for given, row in enumerate(numbers):
        members = np.flatnonzero(labels == given)
        for other, number in enumerate(row):
            if other != given and number:
                margins = probabilities[members, other] - probabilities[members, given]
                flagged[members[np.argsort(-margins, kind="stable")[:number]]] = True
    return flagged & (probabilities.argmax(axis=1) != labels)
