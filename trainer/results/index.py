"""`runs/index.html`: all runs of a folder on one page, those on one data set beside each other."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from trainer.common import files, templates
from trainer.common.text import dollars, duration
from trainer.results.charts import Axis, scale, share_axis
from trainer.results.runs import COLUMNS, COMPLETE, Summary, cells, own_settings
from trainer.results.text import breakable, percent, share

CURVES = 8  # runs that have a colour of their own, the newest
REPORT = "report.html"
# Seconds that are round to people: up to a minute, an hour, and four days.
TIMES: tuple[int, ...] = (1, 2, 5, 10, 20, 30, 60, 120, 300, 600, 1200, 1800, 3600)
TIMES += (7200, 18_000, 36_000, 86_400, 172_800, 345_600)


@dataclass(frozen=True)
class Dot:
    """A run in the plot of accuracy against time. front: no other run is both faster and better."""

    run: Summary
    x: float
    y: float
    front: bool


@dataclass(frozen=True)
class Curve:
    """A run's accuracy on valid by epoch, as SVG's path data. colour: its number, or CURVES."""

    run: Summary
    path: str
    colour: int


@dataclass(frozen=True)
class Plot:
    """Two axes, and what is drawn on them. title: above it."""

    title: str
    x: Axis
    y: Axis
    dots: Sequence[Dot] = ()
    front: str = ""
    curves: Sequence[Curve] = ()


@dataclass(frozen=True)
class Row:
    """A line of the table: texts, and their sort keys."""

    run: Summary
    cells: Sequence[tuple[str, Any]]
    report: str | None  # its address from the page


@dataclass(frozen=True)
class Group:
    """The runs on one data set, the newest first."""

    data: str
    rows: Sequence[Row]
    pareto: Sequence[Plot]
    curves: Plot | None


# The table's columns. The name leads, with a link to the report; the data has a heading of its own.
HEAD = ("run", *(name for name in COLUMNS if name not in ("data", "run")), "differs by")
DOLLARS = HEAD.index("dollars")


def write(runs: Sequence[Summary], path: Path) -> None:
    """Write the page to `path`, whole or not at all. runs: the newest first."""
    names = list(dict.fromkeys(run.data for run in runs))
    paid = any(run.dollars is not None for run in runs)
    groups = [_group(name, [run for run in runs if run.data == name], path) for name in names]
    if not paid:  # no column if no run cost anything
        groups = [replace(group, rows=[_unpaid(row) for row in group.rows]) for group in groups]
    filters: dict[str, Callable[..., Any]] = {
        "share": share,
        "percent": percent,
        "duration": duration,
        "dollars": dollars,
        "breakable": breakable,
    }
    page = templates.render(
        Path(__file__).with_name("index.html.j2"),
        filters,
        title=path.parent.resolve().name,
        count=len(runs),
        groups=groups,
        head=[name for name in HEAD if paid or name != "dollars"],
        most=CURVES,
        script=templates.script(Path(__file__).with_name("index.js.j2")),
    )
    files.write(path, page.encode("utf-8", "backslashreplace"))


def _group(data: str, runs: Sequence[Summary], path: Path) -> Group:
    differing = own_settings(runs)
    rows = []
    for run, differs in zip(runs, differing, strict=True):
        date, _, model, valid, test, interval, epochs, took, cost, state, _ = cells(run)
        values: list[tuple[str, Any]] = [
            (date, run.date),
            (model, model),
            (valid, _sortable(run.valid)),
            (test, _sortable(run.test)),
            (interval, _sortable(run.interval[0] if run.interval else None)),
            (epochs, _sortable(run.epochs)),
            (took, _sortable(run.seconds)),
            (cost, _sortable(run.dollars)),
            (state, state),
            (" ".join(differs), " ".join(differs)),
        ]
        report = None
        if (run.path / REPORT).is_file() and run.path.parent == path.parent:
            report = f"{run.path.name}/{REPORT}"
        rows.append(Row(run, values, report))
    pictures = [
        _pareto("Accuracy against time", runs, [run.seconds for run in runs], _time_axis),
        _pareto("Accuracy against dollars", runs, [run.dollars for run in runs], _dollar_axis),
    ]
    return Group(data, rows, [plot for plot in pictures if plot], _curves(runs))


def _unpaid(row: Row) -> Row:
    place = DOLLARS - 1  # the name stands before the cells
    return replace(row, cells=[*row.cells[:place], *row.cells[place + 1 :]])


def _sortable(value: float | None) -> float:
    """Return the number for sorting; a missing one comes last."""
    return -math.inf if value is None else value


def _pareto(
    title: str,
    runs: Sequence[Summary],
    costs: Sequence[float | None],
    axis: Callable[[float, float], Axis],
) -> Plot | None:
    """Draw accuracy against cost, and the Pareto front."""
    known = [
        (run, spent, run.test)
        for run, spent in zip(runs, costs, strict=True)
        if run.state == COMPLETE
    ]
    placed = [(run, spent, right) for run, spent, right in known if spent and right is not None]
    if len(placed) < 2:
        return None
    spent_in_all = [spent for _, spent, _ in placed]
    x = axis(min(spent_in_all), max(spent_in_all))
    y = share_axis("test top-1", [right for _, _, right in placed])
    dots = []
    for run, spent, right in placed:
        beaten = any(
            other_spent <= spent
            and other_right >= right
            and (other_spent, other_right) != (spent, right)
            for _, other_spent, other_right in placed
        )
        dots.append(Dot(run, x(spent), 1 - y(right), not beaten))
    front = sorted((dot.x, dot.y) for dot in dots if dot.front)
    line = "M" + "L".join(f"{across:.4f} {down:.4f}" for across, down in front)
    return Plot(title, x, y, dots, line)


def _time_axis(shortest: float, longest: float) -> Axis:
    """Return a logarithmic axis with ticks at round times."""
    low = max((time for time in TIMES if time <= shortest), default=TIMES[0] / 2)
    high = min((time for time in TIMES if time >= longest), default=longest * 1.2)
    axis = scale("wall time", low, high, log=True)
    ticks = [time for time in TIMES if low <= time <= high]
    ticks = ticks[:: max(1, math.ceil(len(ticks) / 6))]
    return replace(axis, ticks=[(axis(time), duration(time)) for time in ticks])


def _dollar_axis(least: float, most: float) -> Axis:
    """Return a logarithmic axis with ticks at 1, 2 and 5 of each power of ten."""
    steps = [
        digit * 10.0**power
        for power in range(math.floor(math.log10(least)), math.ceil(math.log10(most)) + 1)
        for digit in (1, 2, 5)
    ]
    low = max((step for step in steps if step <= least), default=least)
    high = min((step for step in steps if step > most), default=2 * most)
    axis = scale("dollars", low, high, log=True)
    ticks = [step for step in steps if low <= step <= high]
    ticks = ticks[:: max(1, math.ceil(len(ticks) / 6))]
    return replace(axis, ticks=[(axis(step), dollars(step)) for step in ticks])


def _curves(runs: Sequence[Summary]) -> Plot | None:
    """Draw valid's accuracy by epoch, of all runs over each other."""
    drawn = [run for run in runs if len(run.curve) > 1]
    if not drawn:
        return None
    epochs = [epoch for run in drawn for epoch, _ in run.curve]
    x = scale("epoch", min(epochs), max(epochs), log=False)
    x = replace(x, ticks=[(at, text) for at, text in x.ticks if "." not in text])  # whole epochs
    y = share_axis("valid top-1", [right for run in drawn for _, right in run.curve])
    curves = []
    for number, run in enumerate(drawn):
        points = (f"{x(epoch):.4f} {1 - y(right):.4f}" for epoch, right in run.curve)
        curves.append(Curve(run, "M" + "L".join(points), min(number, CURVES)))
    return Plot(
        "Accuracy on valid by epoch", x, y, curves=curves[::-1]
    )  # the newest above the others
