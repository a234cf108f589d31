"""The run report: one HTML page that needs no network and no other file.

This module computes the page's content; `report.html.j2` beside it has the layout. Further parts
are in modules of their own: mistakes, confusion, advice, views, predecessor, care.
"""

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from trainer.common import files, templates
from trainer.common.stages import cost
from trainer.common.text import dollars, duration
from trainer.images.care import Findings
from trainer.results import confusion, mistakes
from trainer.results.advice import Advice
from trainer.results.calibrate import COVERAGE, Quality
from trainer.results.care import Thumbnail, sections
from trainer.results.charts import Chart, EpochCharts, Series, reliability_chart
from trainer.results.intervals import wilson_interval
from trainer.results.mistakes import Looks
from trainer.results.outcomes import Outcomes
from trainer.results.predecessor import Predecessor
from trainer.results.text import breakable, number, percent, setting, share, shortened
from trainer.results.views import Views
from trainer.training.recipe import Recipe

# Limits, so that the page stays below about 3 MB for any run.
EPOCH_ROWS = 200
BROKEN_ROWS = 1000
CLASS_ROWS = 20  # rows of the per-class table before the rest is folded away


@dataclass(frozen=True)
class Other:
    """Metrics with or without the images that are in train too.

    how: "with_leaks" or "without_leaks". pictures: how many they are of.
    """

    how: str
    pictures: int
    metrics: dict[str, float]  # loss, top1, top5, f1


@dataclass(frozen=True)
class Report(Outcomes):
    """The content of a run's report. The predictions are of one split: N pictures, C classes."""

    title: str  # the run's name
    split: str  # "test", or "valid" where there is no test split
    # A row an epoch: epoch (from 1), lr, losses, accuracies, and seconds in all, waiting
    # (data_wait) and evaluating.
    history: list[dict[str, float]]
    best_epoch: int
    metrics: dict[str, float]  # of `split`: loss, top1, top5, f1
    broken: Sequence[tuple[str, str]]  # pictures put into quarantine: path, reason
    facts: dict[str, str]  # the environment, in the order shown
    config: dict[str, Any]  # the resolved settings by dotted key
    next_steps: Sequence[str]  # commands
    trained: bool = True  # False: an existing model is evaluated
    quality: Quality | None = None  # of the calibration
    other: Other | None = None
    recipe: Recipe | None = None  # of model=auto
    findings: Findings = field(default_factory=Findings)  # what is wrong with the data set
    about: Sequence[str] = ()  # the subtitle: a line each
    given: Collection[str] = ()  # keys of the settings that the user gave
    # Returns the seconds of the run's parts so far; called after the pictures are drawn.
    stages: Callable[[], Mapping[str, float]] = dict
    # Images of each class, [C], of each split.
    counts: Mapping[str, NDArray[np.int64]] = field(default_factory=dict)
    views: Sequence[Views] = ()
    advice: Sequence[Advice] = ()
    before: Predecessor | None = None
    dollars_hour: float | None = None  # of the machines; None: not known


FILTERS: dict[str, Callable[..., Any]] = {
    "percent": percent,
    "number": number,
    "duration": duration,
    "dollars": dollars,
    "share": share,
    "setting": setting,
    "count": "{:,}".format,
    "name": shortened,
    "breakable": breakable,
    "filename": lambda path: Path(path).name,
}


def write(report: Report, path: Path, thumbnail: Thumbnail, looks: Looks | None = None) -> None:
    """Write the page to `path`, completely or not at all.

    thumbnail: returns the [S, S, 3] uint8 square that the network gets of an image's path. If it
    raises OSError or ValueError (the image is gone), the page leaves the image out. looks: where in
    it the network saw a class. Raise OSError if `path` can't be written.
    """
    charts: list[Chart] = []
    if report.history:
        charts = _charts(report)
    rows = mistakes.table(report)
    folder = mistakes.common_folder(rows)
    pairs = mistakes.pairs(report, thumbnail)
    worst = mistakes.worst(report, thumbnail, looks)
    care = sections(report.findings, thumbnail)
    stages = _stages(report.stages())  # after the pictures, which take most of the page's time
    took = sum(stage.seconds for stage in stages)
    page = templates.render(
        Path(__file__).with_name("report.html.j2"),
        FILTERS,
        report=report,
        chance=1 / len(report.classes),
        hits=report.hits,
        interval=wilson_interval(report.hits, len(report.labels)),
        charts=charts,
        reliability=_reliability(report.quality),
        timing=_timing(report.history),
        pairs=pairs,
        mistakes=worst,
        rows=rows,
        folder=folder,
        csv=mistakes.table_uri(rows),
        matrix=confusion.matrix(report),
        per_class=confusion.per_class(report),
        class_rows=CLASS_ROWS,
        asked_coverage=COVERAGE,
        label_length=confusion.LABEL_LENGTH,
        broken_rows=BROKEN_ROWS,
        care=care,
        epoch_columns=list(EPOCH_COLUMNS),
        epochs=_epochs(report.history),
        given=[key for key in report.config if key in report.given],
        counted=_counted(report.counts),
        stages=stages,
        took=took,
        cost=cost(took, report.dollars_hour),
        script=templates.script(Path(__file__).with_name("report.js.j2")),
    )
    # A file name that isn't UTF-8 has surrogates, which can't be encoded: show them as \udcff.
    files.write(path, page.encode("utf-8", "backslashreplace"))


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
    """Seconds of the whole run by purpose; `total` is their sum."""
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


# --- where the run's time went ---


@dataclass(frozen=True)
class Stage:
    """A part of the run's time. colour: a class of the style sheet. left: where it is drawn."""

    name: str
    seconds: float
    share: float
    left: float
    colour: str


# As many as there are stages, so that all look different.
STAGE_COLOURS = ("grey", "teal", "violet", "olive", "blue", "orange", "pink", "ink")
SHORTEST = 0.05  # seconds; a stage that took less is not named


def _stages(seconds: Mapping[str, float]) -> list[Stage]:
    """Return the parts of the run's time in their order; they add up to all of it."""
    seconds = {name: spent for name, spent in seconds.items() if spent >= SHORTEST}
    total = sum(seconds.values()) or 1.0
    stages, left = [], 0.0
    for place, (name, spent) in enumerate(seconds.items()):
        colour = STAGE_COLOURS[place % len(STAGE_COLOURS)]
        stages.append(Stage(name, spent, spent / total, left / total, colour))
        left += spent
    return stages


# --- the pictures of each class ---


@dataclass(frozen=True)
class Counted:
    """How many images a class has: by split, and in the split that has most of any, as a share."""

    label: int
    by_split: list[int]
    share: float


def _counted(counts: Mapping[str, NDArray[np.int64]]) -> list[Counted]:
    """Return the classes with their images, those with the most training images first."""
    if not counts:
        return []
    first = next(iter(counts.values()))
    order = np.argsort(-first, kind="stable")
    return [
        Counted(
            int(label),
            [int(each[label]) for each in counts.values()],
            float(first[label] / max(first.max(), 1)),
        )
        for label in order
    ]


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

    With more than EPOCH_ROWS, evenly spread ones, including the first and the last.
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
