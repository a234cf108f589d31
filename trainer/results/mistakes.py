"""The report's mistakes: the worst ones, confused pairs, and a table of all."""

import base64
import csv
import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from trainer.results.care import Thumbnail, is_pixelated, picture
from trainer.results.outcomes import Outcomes
from trainer.results.saliency import lit

PAIRS, PAIR_IMAGES, MISTAKES = 6, 4, 12
LISTED = 2000  # rows of the table of all mistakes, so that a page stays below about 3 MB

# Returns where in an image (by its path) the network saw a class, [h, w] in 0..1; None: unknown.
Looks = Callable[[str, int], NDArray[np.float32] | None]


@dataclass(frozen=True)
class Mistake:
    """A wrong prediction. picture, seen: data URIs; in `seen` the parts that counted are bright."""

    picture: str
    seen: str | None
    pixelated: bool
    path: str
    label: str
    prediction: str
    probability: float


@dataclass(frozen=True)
class Pair:
    """Images of one class that were predicted as another. total: images of `label`."""

    label: str
    prediction: str
    count: int
    total: int
    examples: list[Mistake]


@dataclass(frozen=True)
class Row:
    """A mistake in the table."""

    path: str
    label: str
    prediction: str
    probability: float
    of_label: float  # the probability of the true class


def pairs(outcomes: Outcomes, thumbnail: Thumbnail) -> list[Pair]:
    """Return the pairs of classes that were confused most often, and more than once.

    Among equal counts those come first that concern the larger share of their class.
    """
    totals, wrong = outcomes.confusion.sum(axis=1), outcomes.wrong
    rows, columns = np.nonzero(wrong > 1)
    order = np.lexsort((-wrong[rows, columns] / totals[rows], -wrong[rows, columns]))[:PAIRS]
    found = []
    for row, column in zip(rows[order], columns[order], strict=True):
        among = (outcomes.labels == row) & (outcomes.predictions == column)
        examples = _examples(outcomes, outcomes.surest(among)[:PAIR_IMAGES], thumbnail, None)
        found.append(
            Pair(
                label=outcomes.classes[row],
                prediction=outcomes.classes[column],
                count=int(wrong[row, column]),
                total=int(totals[row]),
                examples=examples,
            )
        )
    return found


def worst(outcomes: Outcomes, thumbnail: Thumbnail, looks: Looks | None) -> list[Mistake]:
    """Return the most confident wrong predictions."""
    surest = outcomes.surest(outcomes.predictions != outcomes.labels)
    return _examples(outcomes, surest[:MISTAKES], thumbnail, looks)


def table(outcomes: Outcomes) -> list[Row]:
    """Return the wrong predictions, the most confident first: LISTED at most."""
    return [
        Row(
            outcomes.paths[number],
            outcomes.classes[outcomes.labels[number]],
            outcomes.classes[outcomes.predictions[number]],
            float(outcomes.probabilities[number, outcomes.predictions[number]]),
            float(outcomes.probabilities[number, outcomes.labels[number]]),
        )
        for number in outcomes.surest(outcomes.predictions != outcomes.labels)[:LISTED]
    ]


def table_uri(rows: Sequence[Row]) -> str:
    """Return the table as CSV in a data URI, to be saved from the page."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(("path", "true_label", "label", "probability", "probability_of_true_label"))
    for row in rows:
        shares = (f"{row.probability:.6g}", f"{row.of_label:.6g}")
        writer.writerow((row.path, row.label, row.prediction, *shares))
    data = text.getvalue().encode("utf-8", "backslashreplace")
    return f"data:text/csv;base64,{base64.b64encode(data).decode()}"


def common_folder(rows: Sequence[Row]) -> str:
    """Return the images' common folder, with a slash, so that the page needn't repeat it."""
    folders = [Path(row.path).parts[:-1] for row in rows]
    shared = []
    for parts in zip(*folders, strict=False):
        if len(set(parts)) > 1:
            break
        shared.append(parts[0])
    if not shared:
        return ""
    return f"{Path(*shared)}/".replace("//", "/")


def _examples(
    outcomes: Outcomes, numbers: NDArray[np.int64], thumbnail: Thumbnail, looks: Looks | None
) -> list[Mistake]:
    examples = []
    for number in numbers:
        path, prediction = outcomes.paths[number], outcomes.predictions[number]
        seen, where = None, None
        try:
            pixels = thumbnail(path)
            if looks is not None:
                where = looks(path, int(prediction))
        except (OSError, ValueError):
            continue
        if where is not None:
            seen = picture(lit(pixels, where))
        examples.append(
            Mistake(
                picture=picture(pixels),
                seen=seen,
                pixelated=is_pixelated(pixels),
                path=path,
                label=outcomes.classes[outcomes.labels[number]],
                prediction=outcomes.classes[prediction],
                probability=float(outcomes.probabilities[number, prediction]),
            )
        )
    return examples
