"""Calibration: from logits to an answer, fitted on valid, applied by serving.

A temperature makes probabilities match how often answers are right (Guo et al., "On calibration of
modern neural networks", ICML 2017). For 90 % of pictures, the right class is in the set, by split
conformal prediction (Angelopoulos & Bates, "A gentle introduction to conformal prediction", 2021,
with the score 1 - p of Sadinle et al., 2019, which gives the smallest sets). A picture's features
show whether it is like any training class.

NumPy only. A copy travels in the package, like the temperature's (trainer/common), so fitting and
serving use the same code.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from trainer.common.temperature import losses, optimum, softmax

# With fewer pictures, a temperature must help pictures outside its fit, in so many folds.
FEW, FOLDS = 200, 10

COVERAGE = 90  # percent of the pictures whose set should hold the right class
LIKE = 99  # percent of the pictures of valid that are like those trained on
QUANTILE = 2.326348  # the normal distribution's, of LIKE
LEAST_FOR_DISTANCE = 8  # pictures; with fewer, their spread is unknown

BINS = 15  # of equal width, of the calibration error


@dataclass(frozen=True)
class Calibration:
    """The numbers that turn logits into an answer.

    The defaults are plain softmax, no sets, and no picture `unlike`.
    """

    temperature: float = 1.0
    pictures: int = 0  # pictures of the fit
    # The set has the most probable class, and all that are at least so probable. 0: all classes,
    # since the pictures were too few; None: there are no sets.
    least_probability: float | None = None
    # A picture that is farther than this from each class is `unlike`; None: unknown.
    farthest: float | None = None

    def probabilities(self, logits: NDArray[np.floating[Any]]) -> NDArray[np.float64]:
        """Return the probabilities of logits [N, classes]."""
        return softmax(logits.astype(np.float64) / self.temperature)

    def members(self, probabilities: NDArray[np.float64]) -> NDArray[np.bool_] | None:
        """Return which classes are in each picture's set, [N, classes]; None: there are no sets.

        The most probable one always is.
        """
        if self.least_probability is None:
            return None
        members = probabilities >= self.least_probability
        np.put_along_axis(members, probabilities.argmax(axis=1)[:, None], True, axis=1)
        return members

    def unlike(self, distance: NDArray[np.floating[Any]] | None) -> NDArray[np.bool_] | None:
        """Return which pictures are unlike the training pictures, [N]; None: unknown.

        distance: [N], from the nearest class, as the network returns it.
        """
        if self.farthest is None or distance is None:
            return None
        return distance > self.farthest


def fit(
    logits: NDArray[np.floating[Any]],
    labels: NDArray[np.int64],
    distance: NDArray[np.floating[Any]] | None = None,
) -> tuple[Calibration, list[str]]:
    """Fit the calibration on pictures that weren't trained on; return it, and notes on it.

    logits: [N, classes]; labels: [N]; distance: of all of them or of some, or unknown. The same
    pictures give temperature and sets: one number hardly overfits N pictures, while halving them
    would cost more (docs/decisions). A pure function.
    """
    chosen, notes = temperature(logits, labels)
    calibration = Calibration(chosen, len(labels))
    probabilities = calibration.probabilities(logits)
    right = probabilities[np.arange(len(labels)), labels]
    least = 0.0
    rank = _rank(len(labels), COVERAGE)
    if rank <= len(labels) and np.isfinite(right).all():
        least = float(np.sort(right)[len(labels) - rank])
    else:
        notes.append(
            f"{len(labels)} pictures are too few for sets at {COVERAGE}%: each holds all classes"
        )
    farthest = None
    if distance is not None:
        farthest = limit(distance.astype(np.float64))
        if farthest is None:
            notes.append(f"{len(distance)} pictures are too few to tell what is unlike all of them")
    return Calibration(chosen, len(labels), least, farthest), notes


def temperature(
    logits: NDArray[np.floating[Any]], labels: NDArray[np.int64]
) -> tuple[float, list[str]]:
    """Return the temperature of maximum likelihood, or 1 and the reason.

    logits: [N, classes]; labels: [N].
    """
    if not len(labels):
        return 1.0, ["no valid picture to calibrate on: the temperature stays 1"]
    values = logits.astype(np.float64)
    if not np.isfinite(values).all() or not np.ptp(values, axis=1).any():
        return 1.0, ["the logits of valid say nothing: the temperature stays 1"]
    if len(labels) < FEW and not _helps(values, labels):
        return 1.0, [
            f"a temperature fitted on {len(labels)} pictures doesn't help others: it stays 1"
        ]
    return optimum(values, labels), []


def _helps(logits: NDArray[np.float64], labels: NDArray[np.int64]) -> bool:
    """Return whether temperatures improve the likelihood of labels outside their fit."""
    folds = np.arange(len(labels)) % FOLDS
    before = after = 0.0
    for fold in np.unique(folds):
        inside, outside = folds != fold, folds == fold
        chosen = 1.0
        if inside.any():
            chosen = optimum(logits[inside], labels[inside])
        before += float(losses(logits[outside], labels[outside]).sum())
        after += float(losses(logits[outside] / chosen, labels[outside]).sum())
    return after < before


def _rank(count: int, percent: int) -> int:
    """Return the rank of the score that a new one exceeds in at most 100 - percent % of cases.

    ceil((count + 1) * percent / 100): more than `count` if these are too few.
    """
    return -(-(count + 1) * percent // 100)


def limit(distance: NDArray[np.float64]) -> float | None:
    """Return the distance below which LIKE % of new pictures are; None: N is too small.

    distance: [N]. If N is too small for an order statistic: a normal distribution's prediction
    bound, by Student's t (expanded about the normal quantile, as in Abramowitz & Stegun 26.7.5).
    """
    count = len(distance)
    rank = _rank(count, LIKE)
    if rank <= count:
        return float(np.sort(distance)[rank - 1])
    if count < LEAST_FOR_DISTANCE:
        return None
    z, freedom = QUANTILE, count - 1
    t = z + (z**3 + z) / (4 * freedom) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * freedom**2)
    return float(distance.mean() + t * distance.std(ddof=1) * math.sqrt(1 + 1 / count))


# --- how good it is ---


@dataclass(frozen=True)
class Bin:
    """Pictures whose most probable class is about equally probable."""

    count: int
    confidence: float  # mean probability of the most probable class
    right: float  # share of them whose class that is


@dataclass(frozen=True)
class Quality:
    """How good a calibration is on a split's pictures. before: with plain softmax."""

    calibration: Calibration
    split: str
    before: Sequence[Bin]
    after: Sequence[Bin]
    coverage: float  # share of the pictures whose set holds the right class
    set_size: float  # mean classes of a set
    sure: float  # share of the pictures with one class in the set, like those trained on
    sure_right: float  # share of these that are right; NaN: there are none
    unlike: float | None  # share of the pictures that are unlike those trained on
    notes: Sequence[str] = ()  # notes on the calibration

    @property
    def error_before(self) -> float:
        """Return the expected calibration error of plain softmax."""
        return calibration_error(self.before)

    @property
    def error(self) -> float:
        """Return the expected calibration error."""
        return calibration_error(self.after)

    def facts(self) -> dict[str, Any]:
        """Return its figures for result.json."""
        return {
            "temperature": self.calibration.temperature,
            "pictures": self.calibration.pictures,
            "error_before": round(self.error_before, 6),
            "error": round(self.error, 6),
            "coverage": round(self.coverage, 6),
            "set_size": round(self.set_size, 6),
            "sure": round(self.sure, 6),
            "unlike": None if self.unlike is None else round(self.unlike, 6),
        }

    def line(self) -> str:
        """Return its line for the log."""
        words = (
            f"calibration: temperature {self.calibration.temperature:.3g} "
            f"by {self.calibration.pictures} pictures that it wasn't trained on; "
            f"calibration error on {self.split} {self.error_before:.1%} before, "
            f"{self.error:.1%} after; sets of {self.set_size:.1f} classes hold the right one in "
            f"{self.coverage:.1%} (asked: {COVERAGE}%); sure of {self.sure:.0%}"
        )
        if self.sure:
            words += f", of these {self.sure_right:.0%} right"
        return words


def measure(
    calibration: Calibration,
    split: str,
    logits: NDArray[np.floating[Any]],
    labels: NDArray[np.int64],
    distance: NDArray[np.floating[Any]] | None = None,
) -> Quality:
    """Return how good a calibration is on a split's pictures.

    logits: [N, classes]; labels: [N]; distance: [N], or unknown.
    """
    probabilities = calibration.probabilities(logits)
    members = calibration.members(probabilities)
    assert members is not None
    unlike = calibration.unlike(distance)
    sure = is_sure(members, unlike)
    right = probabilities.argmax(axis=1) == labels
    return Quality(
        calibration,
        split,
        reliability(Calibration().probabilities(logits), labels),
        reliability(probabilities, labels),
        coverage=float(members[np.arange(len(labels)), labels].mean()),
        set_size=float(members.sum(axis=1).mean()),
        sure=float(sure.mean()),
        sure_right=float(right[sure].mean()) if sure.any() else math.nan,
        unlike=None if unlike is None else float(unlike.mean()),
    )


def is_sure(members: NDArray[np.bool_], unlike: NDArray[np.bool_] | None) -> NDArray[np.bool_]:
    """Return which pictures are sure: one class in the set, and not unlike."""
    sure: NDArray[np.bool_] = members.sum(axis=1) == 1
    if unlike is not None:
        sure &= ~unlike
    return sure


def place_of(confidence: Any) -> Any:
    """Return the number of the bin of probabilities, in the form they have."""
    return np.minimum(np.int64(np.multiply(confidence, BINS)), BINS - 1)


def reliability(probabilities: NDArray[np.float64], labels: NDArray[np.int64]) -> list[Bin]:
    """Return the pictures in BINS by how probable their most probable class is; empty ones not."""
    confidence = probabilities.max(axis=1)
    right = probabilities.argmax(axis=1) == labels
    place = place_of(confidence)
    return [
        Bin(int(inside.sum()), float(confidence[inside].mean()), float(right[inside].mean()))
        for inside in (place == number for number in np.unique(place))
    ]


def calibration_error(bins: Sequence[Bin]) -> float:
    """Return the expected calibration error: how far confidence lies from the share of right ones.

    In the mean over the pictures (Naeini et al., AAAI 2015).
    """
    total = sum(each.count for each in bins)
    return sum(each.count * abs(each.confidence - each.right) for each in bins) / max(total, 1)
