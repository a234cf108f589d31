"""The run report: one HTML page that needs no network, no script and no other file.

This module computes what the page shows; `report.html.j2` beside it says how it looks.
"""

import base64
import io
import json
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
from markupsafe import Markup
from numpy.typing import NDArray
from PIL import Image

from trainer.common import files

Thumbnail = Callable[[str], NDArray[np.uint8]]

# What a page holds at most, so that it stays below about 3 MB whatever the run was.
PAIRS, PICTURES_PER_PAIR, MISTAKES = 6, 4, 12
READOUTS = 120  # columns of a chart that answer to the pointer
EPOCH_ROWS = 200
BROKEN_ROWS = 1000
CELLS = 1500  # cells of the confusion matrix that name their classes
CLASS_ROWS = 20  # rows of the per-class table before the rest is folded away
PICTURE_SIDE = 128  # pixels
LABEL_LENGTH = 17  # characters of a class name along the confusion matrix
NAME_LENGTH = 80  # of one elsewhere; file systems allow 255

LABELLED_CLASSES = 40  # more than this and the names along the confusion matrix would overlap
COUNTED_CLASSES = 20  # more than this and the numbers in its cells would


@dataclass(frozen=True)
class Report:
    """What a run has to say. The predictions are of one split: N pictures, C classes."""

    title: str  # the run's name
    split: str  # "test", or "valid" where there is no test split
    history: list[
        dict[str, float]
    ]  # a row an epoch: epoch (from 1), lr, losses, accuracies, and seconds in all, waiting (data_wait) and evaluating
    best_epoch: int
    metrics: dict[str, float]  # of `split`: loss, top1, top5, f1
    classes: Sequence[str]  # [C]
    labels: NDArray[np.int64]  # [N]
    probabilities: NDArray[np.float32]  # [N, C]
    paths: Sequence[str]  # [N]
    broken: Sequence[tuple[str, str]]  # pictures put into quarantine: path, reason
    facts: dict[str, str]  # the environment, in the order shown
    config: dict[str, Any]  # the resolved settings by dotted key
    next_steps: Sequence[str]  # commands

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
    """Writes the page to `path`, whole or not at all.

    `thumbnail` gives the [S, S, 3] uint8 square of a picture's path as the network saw it. Where it raises OSError or ValueError (the picture
    has gone since) the page leaves the picture out. Raises OSError where `path` can't be written.
    """
    page = _template().render(
        report=report,
        chance=1 / len(report.classes),
        hits=(hits := int((report.predictions == report.labels).sum())),
        interval=wilson_interval(hits, len(report.labels)),
        charts=_charts(report) if report.history else [],
        timing=_timing(report.history),
        pairs=_pairs(report, thumbnail),
        mistakes=_mistakes(report, thumbnail),
        matrix=_matrix(report),
        per_class=_per_class(report),
        class_rows=CLASS_ROWS,
        label_length=LABEL_LENGTH,
        broken_rows=BROKEN_ROWS,
        epoch_columns=list(EPOCH_COLUMNS),
        epochs=_epochs(report.history),
    )
    # A file name that is no UTF-8 holds surrogates, which can't be encoded: shown as \udcff.
    files.write(path, page.encode("utf-8", "backslashreplace"))


def wilson_interval(hits: int, total: int) -> tuple[float, float]:
    """The 95% interval of a proportion: E. B. Wilson, "Probable inference, the law of succession, and statistical inference",
    Journal of the American Statistical Association 22 (1927), 209-212. Unlike the normal approximation it holds for few pictures and near 0 and 1.
    """
    if total == 0:
        return 0.0, 1.0
    z = 1.959964  # the normal distribution's 0.975 quantile
    share = hits / total
    centre = share + z**2 / (2 * total)
    spread = z * math.sqrt(share * (1 - share) / total + z**2 / (4 * total**2))
    scale = 1 + z**2 / total
    return max(0.0, (centre - spread) / scale), min(1.0, (centre + spread) / scale)


def _template() -> jinja2.Template:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(
        percent=_percent,
        number=_number,
        duration=_duration,
        share=_share,
        setting=_setting,
        count="{:,}".format,
        name=_name,
        breakable=_breakable,
        filename=lambda path: Path(path).name,
    )
    return environment.get_template("report.html.j2")


# --- how training went ---


@dataclass(frozen=True)
class Series:
    name: str
    colour: str  # a class of the style sheet
    values: NDArray[np.float64]  # one an epoch; NaN: none


@dataclass(frozen=True)
class Line:
    """A curve, or one layer of stacked bars. Coordinates are shares of the plot: x from the left, y from the top."""

    name: str
    colour: str
    path: str  # SVG path data
    dots: list[tuple[float, float]]  # points without a neighbour, which a path would not show
    best: str  # the value at the best epoch
    filled: bool


@dataclass(frozen=True)
class Readout:
    """A column of a chart, and what it says when pointed at."""

    left: float
    width: float
    text: str


@dataclass(frozen=True)
class Chart:
    title: str
    x_ticks: list[tuple[float, str]]
    y_ticks: list[tuple[float, str]]
    best: float | None  # where the best epoch lies
    lines: list[Line]
    readouts: list[Readout]


def _charts(report: Report) -> list[Chart]:
    def series(name: str, colour: str, key: str) -> Series:
        return Series(name, colour, _column(report.history, key))

    loss = [series("train", "orange", "train_loss"), series("valid", "blue", "valid_loss")]
    accuracy = [series("train", "orange", "train_top1"), series("valid", "blue", "valid_top1")]
    accuracy += [series("top-5", "teal", "valid_top5"), series("F1", "violet", "valid_f1")]
    evaluate, wait = (
        series("evaluate", "grey", "evaluate_seconds"),
        series("wait", "orange", "data_wait"),
    )
    compute = (
        _column(report.history, "seconds")
        - np.nan_to_num(evaluate.values)
        - np.nan_to_num(wait.values)
    )
    return [
        _chart(report, "Loss", loss, _number, base=0.0),
        _chart(report, "Accuracy", accuracy, _percent),
        _chart(report, "Learning rate", [series("", "blue", "lr")], _number, base=0.0),
        _chart(
            report,
            "Time per epoch",
            [Series("compute", "blue", np.maximum(0, compute)), evaluate, wait],
            _duration,
            base=0.0,
            stacked=True,
        ),
    ]


def _chart(
    report: Report,
    title: str,
    series: list[Series],
    text: Callable[[float], str],
    base: float = math.inf,
    stacked: bool = False,
) -> Chart:
    """The chart of the series that have a value. text: writes a value. base: where the y axis starts at the latest."""
    epochs = [int(row["epoch"]) for row in report.history]
    best = epochs.index(report.best_epoch) if report.best_epoch in epochs else None
    series = [entry for entry in series if np.isfinite(entry.values).any()]
    values = np.array([entry.values for entry in series]).reshape(len(series), len(epochs))
    tops = np.nan_to_num(values).cumsum(axis=0) if stacked else values
    known = tops[np.isfinite(tops)] if series else np.zeros(1)
    ticks = _ticks(known.min(initial=base), known.max())

    def height(value: Any) -> Any:
        return (ticks[-1] - value) / (ticks[-1] - ticks[0])

    lines = []
    for entry, top in zip(series, tops, strict=True):
        path, dots = (
            (_bars(height(top - np.nan_to_num(entry.values)), height(top)), [])
            if stacked
            else _curve(height(top))
        )
        lines.append(
            Line(
                entry.name,
                entry.colour,
                path,
                dots,
                "" if best is None else text(entry.values[best]),
                stacked,
            )
        )
    marks = sorted(
        {epochs[0], *(int(tick) for tick in _ticks(epochs[0], epochs[-1]) if tick in epochs)}
    )
    return Chart(
        title=title,
        x_ticks=[((epochs.index(mark) + 0.5) / len(epochs), str(mark)) for mark in marks],
        y_ticks=[(height(tick), text(tick).replace(".0%", "%")) for tick in ticks],
        best=None if best is None else (best + 0.5) / len(epochs),
        lines=lines,
        readouts=_readouts(epochs, series, text),
    )


def _readouts(
    epochs: list[int], series: list[Series], text: Callable[[float], str]
) -> list[Readout]:
    count = len(epochs)
    step = math.ceil(count / READOUTS)
    return [
        Readout(
            left=index / count,
            width=min(step, count - index) / count,
            text=" · ".join(
                [
                    f"epoch {epochs[index]}",
                    *(f"{entry.name} {text(entry.values[index])}".strip() for entry in series),
                ]
            ),
        )
        for index in range(0, count, step)
    ]


def _curve(heights: NDArray[np.float64]) -> tuple[str, list[tuple[float, float]]]:
    """The path through the finite points, broken where a value is missing, and the points that have no neighbour."""
    finite = np.isfinite(heights)
    path: list[str] = []
    dots: list[tuple[float, float]] = []
    for index in np.flatnonzero(finite):
        x, y = (index + 0.5) / len(heights), float(heights[index])
        before = index > 0 and finite[index - 1]
        after = index + 1 < len(heights) and finite[index + 1]
        if before or after:
            path.append(f"{'L' if before else 'M'}{x:.4f} {y:.4f}")
        else:
            dots.append((x, y))
    return "".join(path), dots


def _bars(bottoms: NDArray[np.float64], tops: NDArray[np.float64]) -> str:
    """One bar an epoch, from bottom to top; with a gap between them while they are few."""
    band = 1 / len(tops)
    width = min(0.06, band * (0.7 if len(tops) <= 60 else 1.0))
    inset = (band - width) / 2
    return "".join(
        f"M{index * band + inset:.4f} {bottom:.4f}V{top:.4f}h{width:.4f}V{bottom:.4f}z"
        for index, (bottom, top) in enumerate(zip(bottoms, tops, strict=True))
        if top < bottom
    )


def _ticks(low: float, high: float) -> list[float]:
    """About five round numbers that enclose low and high."""
    if not high - low > 1e-9 * abs(high):
        low, high = min(0.0, low), max(0.0, high) or 1.0
    rough = (high - low) / 4
    magnitude = 10.0 ** math.floor(math.log10(rough))
    step = next(
        factor * magnitude for factor in (1, 2, 5, 10) if factor * magnitude >= rough * 0.999
    )
    return [
        tick * step
        for tick in range(math.floor(low / step + 1e-6), math.ceil(high / step - 1e-6) + 1)
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
    """A value of each epoch; NaN where it is missing, or too large to draw since the training diverged."""
    values = np.array([row.get(key, math.nan) for row in history], dtype=np.float64)
    return np.where(np.abs(values) < 1e15, values, math.nan)


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
    """The pairs of classes most often confused; among equal counts those that concern the larger share of their class."""
    confusion = report.confusion
    totals = confusion.sum(axis=1)
    wrong = _off_diagonal(confusion)
    rows, columns = np.nonzero(wrong)
    order = np.lexsort((-wrong[rows, columns] / totals[rows], -wrong[rows, columns]))[:PAIRS]
    pairs = []
    for row, column in zip(rows[order], columns[order], strict=True):
        chosen = _surest(report, (report.labels == row) & (report.predictions == column))[
            :PICTURES_PER_PAIR
        ]
        examples = list(_examples(report, chosen, thumbnail))
        pairs.append(
            Pair(
                report.classes[row],
                report.classes[column],
                int(wrong[row, column]),
                int(totals[row]),
                examples,
            )
        )
    return pairs


def _mistakes(report: Report, thumbnail: Thumbnail) -> list[Mistake]:
    """The wrong predictions that the model was surest of."""
    return list(
        _examples(
            report, _surest(report, report.predictions != report.labels)[:MISTAKES], thumbnail
        )
    )


def _surest(report: Report, among: NDArray[np.bool_]) -> NDArray[np.int64]:
    """Indices of the pictures in `among`, most confident prediction first."""
    indices = np.flatnonzero(among)
    return indices[np.argsort(-report.probabilities[indices].max(axis=1), kind="stable")]


def _examples(
    report: Report, indices: NDArray[np.int64], thumbnail: Thumbnail
) -> Iterator[Mistake]:
    for index in indices:
        try:
            pixels = thumbnail(report.paths[index])
        except (OSError, ValueError):
            continue
        prediction = report.predictions[index]
        yield Mistake(
            picture=_picture(pixels),
            pixelated=len(pixels) < PICTURE_SIDE // 2,
            path=report.paths[index],
            label=report.classes[report.labels[index]],
            prediction=report.classes[prediction],
            probability=float(report.probabilities[index, prediction]),
        )


def _picture(pixels: NDArray[np.uint8]) -> str:
    """A data URI of [H, W, 3] pixels: a small picture as it is, a large one shrunk."""
    image = Image.fromarray(pixels)
    if max(image.size) < PICTURE_SIDE // 2:
        return _data_uri(image, "PNG")
    image.thumbnail((PICTURE_SIDE, PICTURE_SIDE), Image.Resampling.LANCZOS)
    return _data_uri(image, "JPEG")


def _data_uri(image: Image.Image, kind: str) -> str:
    data = io.BytesIO()
    image.save(data, kind, optimize=True)
    return f"data:image/{kind.lower()};base64,{base64.b64encode(data.getvalue()).decode()}"


RIGHT, WRONG = (
    (47, 111, 196),
    (222, 92, 30),
)  # the matrix' colours; their opacity is the value, so that they suit a light and a dark page


def _matrix(report: Report) -> Matrix:
    """The confusion matrix as a heat map: opacity grows with the square root of the share of the row, so that single mistakes show.

    It ends at 0.75: up to there a number in the ink of the page is readable on it.
    """
    confusion = report.confusion
    totals = confusion.sum(axis=1)
    size = len(confusion)
    share = confusion / np.maximum(totals, 1)[:, None]
    alpha = np.where(confusion > 0, 0.2 + 0.55 * np.sqrt(share), 0.0)
    pixels = np.empty((size, size, 4), dtype=np.uint8)
    pixels[..., :3] = np.where(np.eye(size, dtype=bool)[..., None], RIGHT, WRONG)
    pixels[..., 3] = np.round(alpha * 255)
    rows, columns = np.nonzero(confusion)
    order = np.argsort(-confusion[rows, columns], kind="stable")[:CELLS]
    cells = [
        Cell(int(row), int(column), int(confusion[row, column]), int(totals[row]))
        for row, column in zip(rows[order], columns[order], strict=True)
    ]
    labelled = size <= LABELLED_CLASSES
    gutter = (
        1.0 + 0.4 * max(len(_name(name, LABEL_LENGTH)) for name in report.classes)
        if labelled
        else 1.5
    )
    return Matrix(
        _data_uri(Image.fromarray(pixels), "PNG"),
        cells,
        gutter,
        labelled,
        counted=size <= COUNTED_CLASSES,
    )


def _per_class(report: Report) -> list[ClassRow]:
    """A row a class, the least accurate first, classes without a picture last."""
    confusion = report.confusion
    totals, predicted, hits = confusion.sum(axis=1), confusion.sum(axis=0), confusion.diagonal()
    wrong = _off_diagonal(confusion)
    rows = [
        ClassRow(
            name=name,
            hits=int(hits[index]),
            total=int(totals[index]),
            recall=hits[index] / totals[index] if totals[index] else math.nan,
            interval=wilson_interval(int(hits[index]), int(totals[index])),
            precision=hits[index] / predicted[index] if predicted[index] else math.nan,
            rival=report.classes[wrong[index].argmax()],
            rival_count=int(wrong[index].max()),
        )
        for index, name in enumerate(report.classes)
    ]
    return sorted(rows, key=lambda row: (row.total == 0, row.recall))


# --- values as text ---


def _percent(share: float) -> str:
    """With one decimal; 0% and 100% only where there was truly no hit, or no miss."""
    if not math.isfinite(share):
        return "n/a"
    if share in (0, 1):
        return f"{share:.0%}"
    return "> 99.9%" if share > 0.9995 else "< 0.1%" if share < 0.0005 else f"{share:.1%}"


def _number(value: float) -> str:
    return f"{value:.3g}" if math.isfinite(value) else "n/a"


def _duration(seconds: float) -> str:
    if not math.isfinite(seconds):
        return "n/a"
    if seconds < 60:
        return f"{seconds:.3g} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest} s" if rest else f"{minutes} min"
    return f"{minutes // 60} h {minutes % 60} min"


def _share(share: float) -> str:
    """A share as an SVG length. Percentages let a drawing stretch while its text and lines keep their size."""
    return f"{share * 100:.4g}%"


def _setting(value: Any) -> str:
    """A setting as the command line takes it."""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)


def _name(text: str, length: int = NAME_LENGTH) -> str:
    return text if len(text) <= length else text[: length - 1] + "…"


def _breakable(text: str) -> Markup:
    """A name that may break after its underscores, as class names are long and have no spaces."""
    return Markup("_<wbr>").join(_name(text).split("_"))


# --- every epoch in a table ---

EPOCH_COLUMNS = {
    "Learning rate": ("lr", _number),
    "Train loss": ("train_loss", _number),
    "Train top-1": ("train_top1", _percent),
    "Valid loss": ("valid_loss", _number),
    "Valid top-1": ("valid_top1", _percent),
    "Valid top-5": ("valid_top5", _percent),
    "Macro F1": ("valid_f1", _percent),
    "Time": ("seconds", _duration),
    "Waiting": ("data_wait", _duration),
}


def _epochs(history: list[dict[str, float]]) -> list[tuple[int, list[str]]]:
    """The number and the values of the epochs; where they are many, of EPOCH_ROWS evenly spread ones with the first and the last."""
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
