"""The run report: one HTML page that needs no network, no script and no other file.

This module computes what the page shows; `report.html.j2` beside it says how it looks.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from trainer.common import files
from trainer.common.templates import render
from trainer.images.care import Findings
from trainer.results.calibrate import COVERAGE, Quality
from trainer.results.care import Thumbnail, data_uri, is_pixelated, picture, sections
from trainer.results.charts import Chart, EpochCharts, Series, reliability_chart
from trainer.results.text import breakable, duration, number, percent, setting, share, shortened
from trainer.training.recipe import Recipe

# What a page holds at most, so that it stays below about 3 MB whatever the run was.
PAIRS, PAIR_IMAGES, MISTAKES = 6, 4, 12
EPOCH_ROWS = 200
BROKEN_ROWS = 1000
CELLS = 1500  # cells of the confusion matrix that name their classes
CLASS_ROWS = 20  # rows of the per-class table before the rest is folded away
LABEL_LENGTH = 17  # characters of a class name along the confusion matrix

LABELLED_CLASSES = 40  # more than this and the names along the confusion matrix would overlap
COUNTED_CLASSES = 20  # more than this and the numbers in its cells would


@dataclass(frozen=True)
class Other:
    """Metrics with or without the images that are in train too.

    how: "with_leaks" or "without_leaks". pictures: how many they are of.
    """

    how: str
    pictures: int
    metrics: dict[str, float]  # loss, top1, top5, f1


@dataclass(frozen=True)
class Report:
    """What a run has to say. The predictions are of one split: N pictures, C classes."""

    title: str  # the run's name
    split: str  # "test", or "valid" where there is no test split
    # A row an epoch: epoch (from 1), lr, losses, accuracies, and seconds in all, waiting
    # (data_wait) and evaluating.
    history: list[dict[str, float]]
    best_epoch: int
    metrics: dict[str, float]  # of `split`: loss, top1, top5, f1
    classes: Sequence[str]  # [C]
    labels: NDArray[np.int64]  # [N]
    probabilities: NDArray[np.floating[Any]]  # [N, C]
    paths: Sequence[str]  # [N]
    broken: Sequence[tuple[str, str]]  # pictures put into quarantine: path, reason
    facts: dict[str, str]  # the environment, in the order shown
    config: dict[str, Any]  # the resolved settings by dotted key
    next_steps: Sequence[str]  # commands
    trained: bool = True  # False: a model that was there is evaluated
    quality: Quality | None = None  # of the calibration
    other: Other | None = None
    recipe: Recipe | None = None  # of model=auto
    findings: Findings = field(default_factory=Findings)  # what is wrong with the data set

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


def write(report: Report, path: Path, thumbnail: Thumbnail) -> None:
    """Write the page to `path`, whole or not at all.

    thumbnail: gives the [S, S, 3] uint8 square of an image's path as the network saw it. Where it
    raises OSError or ValueError (the image has gone since) the page leaves the image out. Raise
    OSError where `path` can't be written.
    """
    hits = int((report.predictions == report.labels).sum())
    charts: list[Chart] = []
    if report.history:
        charts = _charts(report)
    filters: dict[str, Callable[..., Any]] = {
        "percent": percent,
        "number": number,
        "duration": duration,
        "share": share,
        "setting": setting,
        "count": "{:,}".format,
        "name": shortened,
        "breakable": breakable,
        "filename": lambda path: Path(path).name,
    }
    page = render(
        Path(__file__).with_name("report.html.j2"),
        filters,
        report=report,
        chance=1 / len(report.classes),
        hits=hits,
        interval=wilson_interval(hits, len(report.labels)),
        charts=charts,
        reliability=_reliability(report.quality),
        timing=_timing(report.history),
        pairs=_pairs(report, thumbnail),
        mistakes=_mistakes(report, thumbnail),
        matrix=_matrix(report),
        per_class=_per_class(report),
        class_rows=CLASS_ROWS,
        asked_coverage=COVERAGE,
        label_length=LABEL_LENGTH,
        broken_rows=BROKEN_ROWS,
        care=sections(report.findings, thumbnail),
        epoch_columns=list(EPOCH_COLUMNS),
        epochs=_epochs(report.history),
    )
    # A file name that is no UTF-8 holds surrogates, which can't be encoded: shown as \udcff.
    files.write(path, page.encode("utf-8", "backslashreplace"))


def wilson_interval(hits: int, total: int) -> tuple[float, float]:
    """Return the 95% interval of a proportion, 0 to 1.

    E. B. Wilson, "Probable inference, the law of succession, and statistical inference", Journal
    of the American Statistical Association 22 (1927), 209-212. Unlike the normal approximation it
    holds for few images and near 0 and 1.
    """
    if total == 0:
        return 0.0, 1.0
    z = 1.959964  # the normal distribution's 0.975 quantile
    share = hits / total
    centre = share + z**2 / (2 * total)
    spread = z * math.sqrt(share * (1 - share) / total + z**2 / (4 * total**2))
    scale = 1 + z**2 / total
    return max(0.0, (centre - spread) / scale), min(1.0, (centre + spread) / scale)


# --- how training went ---


def _charts(report: Report) -> list[Chart]:
    draw = EpochCharts([int(row["epoch"]) for row in report.history], report.best_epoch).draw

    def series(name: str, colour: str, key: str) -> Series:
        return Series(name, colour, _column(report.history, key))

    loss = [series("train", "orange", "train_loss"), series("valid", "blue", "valid_loss")]
    accuracy = [series("train", "orange", "train_top1"), series("valid", "blue", "valid_top1")]
    accuracy += [series("top-5", "teal", "valid_top5"), series("F1", "violet", "valid_f1")]
    evaluate = series("evaluate", "grey", "evaluate_seconds")
    wait = series("wait", "orange", "data_wait")
    other = np.nan_to_num(evaluate.values), np.nan_to_num(wait.values)
    compute = _column(report.history, "seconds") - other[0] - other[1]
    times = [Series("compute", "blue", np.maximum(0, compute)), evaluate, wait]
    return [
        draw("Loss", loss, number, base=0.0),
        draw("Accuracy", accuracy, percent),
        draw("Learning rate", [series("", "blue", "lr")], number, base=0.0),
        draw("Time per epoch", times, duration, base=0.0, stacked=True),
    ]


def _timing(history: list[dict[str, float]]) -> dict[str, float]:
    """Seconds of the whole run by what they were spent on; `total` is their sum."""
    total, wait, evaluate = (
        float(np.nansum(_column(history, key)))
        for key in ("seconds", "data_wait", "evaluate_seconds")
    )
    return {
        "compute": max(0.0, total - wait - evaluate),
        "evaluate": evaluate,
        "wait": wait,
        "total": max(total, wait + evaluate),
    }


def _column(history: list[dict[str, float]], key: str) -> NDArray[np.float64]:
    """Return a value of each epoch; NaN where it is missing, or too large to draw."""
    values = np.array([row.get(key, math.nan) for row in history], dtype=np.float64)
    return np.where(np.abs(values) < 1e15, values, math.nan)


def _reliability(quality: Quality | None) -> Chart | None:
    if quality is None:
        return None
    return reliability_chart(quality.before, quality.after, percent)


# --- where the model fails ---


@dataclass(frozen=True)
class Mistake:
    picture: str  # data URI
    pixelated: bool
    path: str
    label: str
    prediction: str
    probability: float


@dataclass(frozen=True)
class Pair:
    label: str
    prediction: str
    count: int
    total: int  # pictures of `label`
    examples: list[Mistake]


@dataclass(frozen=True)
class Cell:
    row: int
    column: int
    count: int
    total: int  # of the row


@dataclass(frozen=True)
class Matrix:
    picture: str  # data URI: a pixel a cell
    cells: list[Cell]
    gutter: float  # room for the longest label, in rem
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
    rival: str  # what its pictures are most often taken for
    rival_count: int


def _off_diagonal(confusion: NDArray[np.int64]) -> NDArray[np.int64]:
    """The mistakes alone."""
    return confusion * (1 - np.eye(len(confusion), dtype=np.int64))


def _pairs(report: Report, thumbnail: Thumbnail) -> list[Pair]:
    """Return the pairs of classes most often confused.

    Among equal counts those come first that concern the larger share of their class.
    """
    confusion = report.confusion
    totals = confusion.sum(axis=1)
    wrong = _off_diagonal(confusion)
    rows, columns = np.nonzero(wrong)
    order = np.lexsort((-wrong[rows, columns] / totals[rows], -wrong[rows, columns]))[:PAIRS]
    pairs = []
    for row, column in zip(rows[order], columns[order], strict=True):
        among = (report.labels == row) & (report.predictions == column)
        pairs.append(
            Pair(
                label=report.classes[row],
                prediction=report.classes[column],
                count=int(wrong[row, column]),
                total=int(totals[row]),
                examples=_examples(report, _surest(report, among)[:PAIR_IMAGES], thumbnail),
            )
        )
    return pairs


def _mistakes(report: Report, thumbnail: Thumbnail) -> list[Mistake]:
    """The wrong predictions that the model was surest of."""
    surest = _surest(report, report.predictions != report.labels)
    return _examples(report, surest[:MISTAKES], thumbnail)


def _surest(report: Report, among: NDArray[np.bool_]) -> NDArray[np.int64]:
    """Indices of the pictures in `among`, most confident prediction first."""
    indices = np.flatnonzero(among)
    return indices[np.argsort(-report.probabilities[indices].max(axis=1), kind="stable")]


def _examples(report: Report, indices: NDArray[np.int64], thumbnail: Thumbnail) -> list[Mistake]:
    examples = []
    for index in indices:
        try:
            pixels = thumbnail(report.paths[index])
        except (OSError, ValueError):
            continue
        prediction = report.predictions[index]
        examples.append(
            Mistake(
                picture=picture(pixels),
                pixelated=is_pixelated(pixels),
                path=report.paths[index],
                label=report.classes[report.labels[index]],
                prediction=report.classes[prediction],
                probability=float(report.probabilities[index, prediction]),
            )
        )
    return examples


# The matrix' colours; their opacity is the value, so that they suit a light and a dark page.
CORRECT, WRONG = (47, 111, 196), (222, 92, 30)


def _matrix(report: Report) -> Matrix:
    """Return the confusion matrix as a heat map.

    Opacity grows with the square root of the share of the row, so that single mistakes show. It
    ends at 0.75: up to there a number in the ink of the page is readable on it.
    """
    confusion = report.confusion
    totals = confusion.sum(axis=1)
    size = len(confusion)
    share = confusion / np.maximum(totals, 1)[:, None]
    alpha = np.where(confusion > 0, 0.2 + 0.55 * np.sqrt(share), 0.0)
    pixels = np.empty((size, size, 4), dtype=np.uint8)
    pixels[..., :3] = np.where(np.eye(size, dtype=bool)[..., None], CORRECT, WRONG)
    pixels[..., 3] = np.round(alpha * 255)
    rows, columns = np.nonzero(confusion)
    order = np.argsort(-confusion[rows, columns], kind="stable")[:CELLS]
    cells = [
        Cell(int(row), int(column), int(confusion[row, column]), int(totals[row]))
        for row, column in zip(rows[order], columns[order], strict=True)
    ]
    labelled = size <= LABELLED_CLASSES
    gutter = 1.5
    if labelled:
        longest = max(len(shortened(name, LABEL_LENGTH)) for name in report.classes)
        gutter = 1.0 + 0.4 * longest
    return Matrix(
        data_uri(Image.fromarray(pixels), "PNG"),
        cells,
        gutter,
        labelled,
        counted=size <= COUNTED_CLASSES,
    )


def _per_class(report: Report) -> list[ClassRow]:
    """A row a class, the least accurate first, classes without a picture last."""
    confusion = report.confusion
    totals, hits = confusion.sum(axis=1), confusion.diagonal()
    with np.errstate(invalid="ignore"):  # of a class without a picture, or never predicted: NaN
        recalls, precisions = hits / totals, hits / confusion.sum(axis=0)
    wrong = _off_diagonal(confusion)
    rows = [
        ClassRow(
            name=name,
            hits=int(hits[index]),
            total=int(totals[index]),
            recall=recalls[index],
            interval=wilson_interval(int(hits[index]), int(totals[index])),
            precision=precisions[index],
            rival=report.classes[wrong[index].argmax()],
            rival_count=int(wrong[index].max()),
        )
        for index, name in enumerate(report.classes)
    ]
    return sorted(rows, key=lambda row: (row.total == 0, row.recall))


# --- every epoch in a table ---

EPOCH_COLUMNS = {
    "Learning rate": ("lr", number),
    "Train loss": ("train_loss", number),
    "Train top-1": ("train_top1", percent),
    "Valid loss": ("valid_loss", number),
    "Valid top-1": ("valid_top1", percent),
    "Valid top-5": ("valid_top5", percent),
    "Macro F1": ("valid_f1", percent),
    "Time": ("seconds", duration),
    "Waiting": ("data_wait", duration),
}


def _epochs(history: list[dict[str, float]]) -> list[tuple[int, list[str]]]:
    """Return the number and the values of the epochs.

    Where they are many, of EPOCH_ROWS evenly spread ones with the first and the last.
    """
    chosen = np.unique(
        np.linspace(0, len(history) - 1, min(len(history), EPOCH_ROWS)).round().astype(int)
    )
    return [
        (
            int(history[index]["epoch"]),
            [text(history[index].get(key, math.nan)) for key, text in EPOCH_COLUMNS.values()],
        )
        for index in chosen
    ]
