"""The sweep's page: one HTML file that needs no network, no script and no other file.

This module computes its content; `page.html.j2` beside it has the layout, and
`trainer/results/charts.py` places values in a plot.
"""

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trainer.common import files
from trainer.common.templates import render
from trainer.results.charts import Axis, choice_axis, measured_axis, scale, share_axis
from trainer.results.text import percent, share, shortened
from trainer.settings import words
from trainer.settings.search_space import Categorical, Parameter, Sweep
from trainer.settings.words import Value
from trainer.sweep.ledger import COMPLETE, FAILED, PRUNED, RUNNING, Trial

LABEL_LENGTH = 16  # characters of a choice along an axis
CURVES = 200  # trials whose curves are drawn; a grid may have thousands


@dataclass(frozen=True)
class Page:
    """The content of a sweep's page, at its end or while it runs."""

    title: str
    sweep: Sweep
    trials: Sequence[Trial]  # the best first
    best: Trial | None  # None: none may be called so
    rows: Mapping[int, Sequence[Mapping[str, Any]]]  # the evaluated epochs of each trial
    again: str  # the command that trains the best trial once more
    facts: Mapping[str, str]


@dataclass(frozen=True)
class Mark:
    """A trial in a plot: a line through its points, or a dot."""

    trial: Trial
    points: Sequence[tuple[float, float]]
    rank: float  # 0: the best, 1: the worst; chooses the colour

    @property
    def path(self) -> str:
        """Return the line as SVG's path data."""
        return "M" + "L".join(f"{x:.4f} {y:.4f}" for x, y in self.points)


@dataclass(frozen=True)
class Plot:
    """A plot: its axes, and a mark for each trial."""

    title: str
    x: Axis
    y: Axis
    marks: Sequence[Mark]  # the best one last, above the others
    lines: bool = False


def write(page: Page, path: Path) -> None:
    """Write the page to `path`, completely or not at all. Raise OSError if that fails."""
    known = [
        trial
        for trial in page.trials
        if trial.state in (COMPLETE, PRUNED) and trial.value is not None
    ]
    parameters = [_axis(parameter) for parameter in page.sweep.space]
    objective = (
        _objective_axis(page.sweep.objective, [_number(trial.value) for trial in known])
        if known
        else None
    )
    filters = {
        "share": share,
        "value": _short,
        "number": percent if _is_share(page.sweep.objective) else "{:.4g}".format,
    }
    html = render(
        Path(__file__).with_name("page.html.j2"),
        filters,
        page=page,
        best=page.best,
        ties=_ties(page),
        epoch={trial.number: _best_epoch(page, trial) for trial in page.trials},
        states={
            state: sum(trial.state == state for trial in page.trials)
            for state in (COMPLETE, RUNNING, PRUNED, FAILED)
        },
        failed=[trial for trial in page.trials if trial.reason],
        axes=[*parameters, objective] if objective else [],
        parallel=_parallel(known, parameters, objective) if objective else [],
        plots=_plots(page, known, parameters, objective) if objective else [],
    )
    files.write(path, html.encode("utf-8", "backslashreplace"))


def _parallel(known: Sequence[Trial], parameters: Sequence[Axis], objective: Axis) -> list[Mark]:
    """Return the lines of the parallel coordinates: one a trial, through its value on each axis."""

    def points(trial: Trial) -> list[tuple[float, float]]:
        heights = [axis(trial.params[axis.name]) for axis in parameters] + [objective(trial.value)]
        return [(number / len(parameters), 1 - height) for number, height in enumerate(heights)]

    return _marks(known, points)


def _plots(
    page: Page, known: Sequence[Trial], parameters: Sequence[Axis], objective: Axis
) -> list[Plot]:
    """Plot the objective against each parameter, the trial's number, and by epoch."""

    def against(axis: Axis, value: Callable[[Trial], Value]) -> Plot:
        return Plot(
            axis.name,
            axis,
            objective,
            _marks(known, lambda trial: [(axis(value(trial)), 1 - objective(trial.value))]),
        )

    def of(key: str) -> Callable[[Trial], Value]:
        return lambda trial: trial.params[key]

    plots = [against(axis, of(axis.name)) for axis in parameters]
    plots.append(
        against(
            measured_axis("trial", [trial.number for trial in page.trials]),
            lambda trial: trial.number,
        )
    )
    curves = {
        trial.number: page.rows[trial.number] for trial in known[:CURVES] if page.rows[trial.number]
    }
    if curves:
        rows = list(itertools.chain(*curves.values()))
        epochs = measured_axis("epoch", [row["epoch"] for row in rows])
        values = [row[page.sweep.objective] for row in rows]
        heights = _objective_axis(page.sweep.objective, values)

        def curve(trial: Trial) -> list[tuple[float, float]]:
            return [
                (epochs(row["epoch"]), 1 - heights(row[page.sweep.objective]))
                for row in curves[trial.number]
            ]

        plots.append(
            Plot(
                "epoch",
                epochs,
                heights,
                _marks([trial for trial in known if trial.number in curves], curve),
                lines=True,
            )
        )
    return plots


def _marks(
    trials: Sequence[Trial], points: Callable[[Trial], Sequence[tuple[float, float]]]
) -> list[Mark]:
    """Return marks for trials (given best first), in drawing order.

    Equal values have equal colours.
    """
    values = list(dict.fromkeys(trial.value for trial in trials))
    worst = max(len(values) - 1, 1)
    return [
        Mark(trial, points(trial), values.index(trial.value) / worst) for trial in reversed(trials)
    ]


def _short(value: Value) -> str:
    """Return a setting with four digits; the command to train it again has all."""
    if isinstance(value, float):
        return f"{value:.4g}"
    return words.text(value)


def _is_share(objective: str) -> bool:
    """Return whether the objective is shown in percent."""
    return objective.rpartition("_")[2] in ("top1", "top5", "f1")


def _objective_axis(objective: str, values: Sequence[float]) -> Axis:
    if _is_share(objective):
        return share_axis(objective, values)
    return measured_axis(objective, values)


def _ties(page: Page) -> list[int]:
    """Return the numbers of the trials that are as good as the best."""
    best = page.best
    if best is None:
        return []
    return [
        trial.number
        for trial in page.trials
        if trial.state == COMPLETE and trial.value == best.value and trial.number != best.number
    ]


def _best_epoch(page: Page, trial: Trial) -> int | None:
    """Return the epoch at which the trial had its value."""
    return next(
        (
            row["epoch"]
            for row in page.rows[trial.number]
            if row[page.sweep.objective] == trial.value
        ),
        None,
    )


def _axis(parameter: Parameter) -> Axis:
    if isinstance(parameter, Categorical):
        labels = [shortened(words.text(choice), LABEL_LENGTH) for choice in parameter.choices]
        return choice_axis(parameter.key, parameter.choices, labels)
    return scale(parameter.key, parameter.low, parameter.high, parameter.log)


def _number(value: Value) -> float:
    assert isinstance(value, int | float), value
    return float(value)
