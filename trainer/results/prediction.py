"""A model's prediction for a picture: the answer of every adapter, and a row of every table.

NumPy and the standard library only. A copy travels in the package.
"""

import html
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from trainer.results.calibrate import Calibration, is_sure


@dataclass(frozen=True)
class Prediction:
    """One picture's classes, the most probable first.

    labels: all classes; probabilities: theirs. members: the set; for 90 % of pictures the right
    class is in it. sure: whether the set has one class, and the picture isn't unlike. unlike:
    whether it is unlike the training pictures. None: the package can't tell.
    """

    labels: tuple[str, ...]
    probabilities: tuple[float, ...]
    members: tuple[str, ...] | None = None
    sure: bool | None = None
    unlike: bool | None = None

    @property
    def label(self) -> str:
        """The most probable class."""
        return self.labels[0]

    @property
    def probability(self) -> float:
        """The probability of `label`."""
        return self.probabilities[0]

    def _repr_html_(self) -> str:
        """Return the most probable classes as a table, for notebooks."""
        rows = "".join(
            f"<tr><td>{html.escape(label)}</td><td>{probability:.1%}</td></tr>"
            for label, probability in zip(self.labels[:3], self.probabilities[:3], strict=True)
        )
        note = ""
        if self.unlike:
            note = "<caption>unlike anything that was trained on</caption>"
        return f"<table>{note}{rows}</table>"


def predictions(
    calibration: Calibration,
    classes: Sequence[str],
    logits: NDArray[np.floating[Any]],
    distance: NDArray[np.floating[Any]] | None,
) -> list[Prediction]:
    """Return the predictions from logits [N, classes] and distances [N] to the nearest class."""
    probabilities = calibration.probabilities(logits)
    members = calibration.members(probabilities)
    unlike = calibration.unlike(distance)
    sure = None
    if members is not None:
        sure = is_sure(members, unlike)
    result: list[Prediction] = []
    for number, row in enumerate(probabilities):
        order = np.argsort(-row, kind="stable")
        in_set, certain, strange = None, None, None
        if members is not None and sure is not None:
            in_set = tuple(classes[index] for index in order if members[number, index])
            certain = bool(sure[number])
        if unlike is not None:
            strange = bool(unlike[number])
        labels = tuple(classes[index] for index in order)
        result.append(Prediction(labels, tuple(row[order].tolist()), in_set, certain, strange))
    return result
