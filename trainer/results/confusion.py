"""The report's confusion matrix, and its row for each class."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from trainer.results.care import data_uri
from trainer.results.intervals import wilson_interval
from trainer.results.outcomes import Outcomes
from trainer.results.text import shortened

CELLS = 1500  # cells of the matrix that name their classes
LABEL_LENGTH = 17  # characters of a class name along the matrix
LABELLED_CLASSES = 150  # with more classes, names along the matrix would make it far too wide
COUNTED_CLASSES = 20  # with more classes the numbers in the cells would overlap

# The matrix' colours; their opacity is the value, so that they suit a light and a dark page.
CORRECT, WRONG = (47, 111, 196), (222, 92, 30)


@dataclass(frozen=True)
class Cell:
    row: int
    column: int
    count: int
    total: int  # of the row


@dataclass(frozen=True)
class Matrix:
    """The confusion matrix as a heat map. names: along both of its sides."""

    picture: str  # data URI: a pixel a cell
    names: list[str]
    cells: list[Cell]
    gutter: float  # room for the longest name, in rem
    labelled: bool
    counted: bool


@dataclass(frozen=True)
class ClassRow:
    name: str
    hits: int
    total: int
    recall: float
    interval: tuple[float, float]
    precision: float
    rival: str  # the class most often predicted instead
    rival_count: int


def matrix(outcomes: Outcomes) -> Matrix:
    """Return the matrix, with classes that the model confuses side by side.

    Opacity grows with the square root of the share of the row, so that single mistakes show. It
    ends at 0.75: up to there a number in the ink of the page is readable on it.
    """
    order = by_likeness(outcomes)
    confusion = outcomes.confusion[np.ix_(order, order)]
    names = [outcomes.classes[place] for place in order]
    totals = confusion.sum(axis=1)
    size = len(confusion)
    share = confusion / np.maximum(totals, 1)[:, None]
    alpha = np.where(confusion > 0, 0.2 + 0.55 * np.sqrt(share), 0.0)
    pixels = np.empty((size, size, 4), dtype=np.uint8)
    pixels[..., :3] = np.where(np.eye(size, dtype=bool)[..., None], CORRECT, WRONG)
    pixels[..., 3] = np.round(alpha * 255)
    rows, columns = np.nonzero(confusion)
    largest = np.argsort(-confusion[rows, columns], kind="stable")[:CELLS]
    cells = [
        Cell(int(row), int(column), int(confusion[row, column]), int(totals[row]))
        for row, column in zip(rows[largest], columns[largest], strict=True)
    ]
    labelled = size <= LABELLED_CLASSES
    gutter = 1.5
    if labelled:
        longest = max(len(shortened(name, LABEL_LENGTH)) for name in names)
        gutter = 1.0 + 0.4 * longest
    picture = data_uri(Image.fromarray(pixels), "PNG")
    return Matrix(picture, names, cells, gutter, labelled, counted=size <= COUNTED_CLASSES)


def by_likeness(outcomes: Outcomes) -> NDArray[np.int64]:
    """Return the positions of the classes, [C], with similar classes close to each other.

    The similarity of two classes is the probability that one's pictures give to the other. The
    order is that of the Fiedler vector of this graph (Atkins, Boman and Hendrickson, "A spectral
    algorithm for seriation and the consecutive ones problem", SIAM Journal on Computing 28, 1998).
    """
    size = len(outcomes.classes)
    if size < 3:
        return np.arange(size)
    given = np.zeros((size, size))
    np.add.at(given, outcomes.labels, np.nan_to_num(outcomes.probabilities.astype(np.float64)))
    given /= np.maximum(np.bincount(outcomes.labels, minlength=size), 1)[:, None]
    alike = given + given.T
    np.fill_diagonal(alike, 0.0)
    alike += 1e-9  # classes without a picture are equally dissimilar to all others
    # Normalized, so that a class similar to many or to none isn't moved to an end.
    degrees = alike.sum(axis=1)
    laplacian = np.diag(degrees) - alike
    scale = 1 / np.sqrt(degrees)
    _, vectors = np.linalg.eigh(laplacian * scale[:, None] * scale)
    fiedler = vectors[:, 1] * scale
    if np.argmax(np.abs(fiedler)) > size // 2:  # its sign is arbitrary: follow the names
        fiedler = -fiedler
    return np.argsort(fiedler, kind="stable")


def per_class(outcomes: Outcomes) -> list[ClassRow]:
    """Return a row for each class, the least accurate first, classes without images last."""
    confusion = outcomes.confusion
    totals, hits = confusion.sum(axis=1), confusion.diagonal()
    with np.errstate(invalid="ignore"):  # NaN for a class without images, or one never predicted
        recalls, precisions = hits / totals, hits / confusion.sum(axis=0)
    wrong = outcomes.wrong
    rows = [
        ClassRow(
            name=name,
            hits=int(hits[index]),
            total=int(totals[index]),
            recall=recalls[index],
            interval=wilson_interval(int(hits[index]), int(totals[index])),
            precision=precisions[index],
            rival=outcomes.classes[wrong[index].argmax()],
            rival_count=int(wrong[index].max()),
        )
        for index, name in enumerate(outcomes.classes)
    ]
    return sorted(rows, key=lambda row: (row.total == 0, row.recall))
