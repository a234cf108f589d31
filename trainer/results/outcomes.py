"""A model's predictions for N labelled pictures of C classes, and counts from them."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class Outcomes:
    """The true classes of N pictures, and the predicted probabilities of C classes."""

    classes: Sequence[str]  # [C]
    labels: NDArray[np.int64]  # [N]
    probabilities: NDArray[np.floating[Any]]  # [N, C]
    paths: Sequence[str]  # [N]

    @cached_property
    def predictions(self) -> NDArray[np.int64]:
        """[N]: the most probable class of each picture."""
        predictions: NDArray[np.int64] = self.probabilities.argmax(axis=1)
        return predictions

    @cached_property
    def confusion(self) -> NDArray[np.int64]:
        """[C, C] counts: the row is the true class, the column the predicted one."""
        counts = np.zeros((len(self.classes), len(self.classes)), dtype=np.int64)
        np.add.at(counts, (self.labels, self.predictions), 1)
        return counts

    @property
    def wrong(self) -> NDArray[np.int64]:
        """[C, C]: the mistakes alone."""
        return self.confusion * (1 - np.eye(len(self.classes), dtype=np.int64))

    @property
    def hits(self) -> int:
        """How many pictures are right."""
        return int((self.predictions == self.labels).sum())

    def surest(self, among: NDArray[np.bool_]) -> NDArray[np.int64]:
        """Return the numbers of the pictures in `among`, most confident prediction first."""
        numbers = np.flatnonzero(among)
        return numbers[np.argsort(-self.probabilities[numbers].max(axis=1), kind="stable")]
