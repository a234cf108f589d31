"""The charts of the report and of the sweep's page, as shares of a plot; the templates draw them.

Coordinates are 0 to 1: x from the left, y from the top.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from trainer.results.calibrate import BINS, Bin, calibration_error, place_of

Text = Callable[[float], str]  # writes a value

LARGEST = 16  # radius in pixels of a dot that stands for all pictures
READOUTS = 120  # columns of a chart that answer to the pointer


# --- what is drawn by epoch: curves and stacked bars ---


@dataclass(frozen=True)
class Series:
    """The values of one thing, by epoch."""

    name: str
    colour: str  # a class of the style sheet
    values: NDArray[np.float64]  # one an epoch; NaN: none


@dataclass(frozen=True)
class Line:
    """A curve, or one layer of stacked bars."""

    name: str
    colour: str
    path: str  # SVG path data
    dots: list[tuple[float, float]]  # points without a neighbour, which a path would not show
    best: str  # the value at the best epoch, or another that is to stand beside the name
    filled: bool
    radii: Sequence[int] = ()  # of the dots, in pixels, where these are not all alike


@dataclass(frozen=True)
class Readout:
    """A column of a chart, and its text under the pointer."""

    left: float
    width: float
    text: str


@dataclass(frozen=True)
class Chart:
    """A chart, ready to be drawn."""

    title: str
    x_ticks: list[tuple[float, str]]
    y_ticks: list[tuple[float, str]]
    best: float | None  # where the best epoch lies
    lines: list[Line]
    readouts: list[Readout]
    along: str = "by epoch"  # what the x axis is


@dataclass(frozen=True)
class EpochCharts:
    """Draws charts over the epochs of a run. best_epoch: the one that is marked."""

    epochs: Sequence[int]
    best_epoch: int

    def draw(
        self,
        title: str,
        series: list[Series],
        text: Text,
        base: float = math.inf,
        stacked: bool = False,
    ) -> Chart:
        """Return the chart of the series that have a value.

        text: writes a value. base: where the y axis starts at the latest.
        """
        epochs, count = self.epochs, len(self.epochs)
        series = [entry for entry in series if np.isfinite(entry.values).any()]
        tops = np.array([entry.values for entry in series]).reshape(len(series), count)
        if stacked:
            tops = np.nan_to_num(tops).cumsum(axis=0)
        known = tops[np.isfinite(tops)]
        if not series:
            known = np.zeros(1)
        ticks = enclosing_ticks(known.min(initial=base), known.max())

        def height(value: Any) -> Any:
            return (ticks[-1] - value) / (ticks[-1] - ticks[0])

        best, best_at = None, None
        if self.best_epoch in epochs:
            best = epochs.index(self.best_epoch)
            best_at = (best + 0.5) / count
        lines = []
        for entry, top in zip(series, tops, strict=True):
            if stacked:
                dots: list[tuple[float, float]] = []
                path = _bars(height(top - np.nan_to_num(entry.values)), height(top))
            else:
                path, dots = _curve(height(top))
            value = ""
            if best is not None:
                value = text(entry.values[best])
            lines.append(Line(entry.name, entry.colour, path, dots, value, stacked))
        round_epochs = {int(tick) for tick in enclosing_ticks(epochs[0], epochs[-1])}
        marks = sorted({epochs[0], *round_epochs.intersection(epochs)})
        return Chart(
            title=title,
            x_ticks=[((epochs.index(mark) + 0.5) / count, str(mark)) for mark in marks],
            y_ticks=[(height(tick), text(tick).replace(".0%", "%")) for tick in ticks],
            best=best_at,
            lines=lines,
            readouts=self._readouts(series, text),
        )

    def _readouts(self, series: list[Series], text: Text) -> list[Readout]:
        count = len(self.epochs)
        step = math.ceil(count / READOUTS)
        readouts = []
        for index in range(0, count, step):
            values = [f"{entry.name} {text(entry.values[index])}".strip() for entry in series]
            words = " · ".join([f"epoch {self.epochs[index]}", *values])
            readouts.append(Readout(index / count, min(step, count - index) / count, words))
        return readouts


def _curve(heights: NDArray[np.float64]) -> tuple[str, list[tuple[float, float]]]:
    """Return the path through the finite points, and the points that have no neighbour.

    The path is broken where a value is missing.
    """
    finite = np.isfinite(heights)
    path: list[str] = []
    dots: list[tuple[float, float]] = []
    for index in np.flatnonzero(finite):
        x, y = (index + 0.5) / len(heights), float(heights[index])
        before = bool(index > 0 and finite[index - 1])
        after = index + 1 < len(heights) and finite[index + 1]
        if before or after:
            command = "M"
            if before:
                command = "L"
            path.append(f"{command}{x:.4f} {y:.4f}")
        else:
            dots.append((x, y))
    return "".join(path), dots


def _bars(bottoms: NDArray[np.float64], tops: NDArray[np.float64]) -> str:
    """Return one bar an epoch, from bottom to top; with gaps between them while they are few."""
    band = 1 / len(tops)
    width = min(0.06, band)
    if len(tops) <= 60:
        width = min(0.06, band * 0.7)
    inset = (band - width) / 2
    return "".join(
        f"M{index * band + inset:.4f} {bottom:.4f}V{top:.4f}h{width:.4f}V{bottom:.4f}z"
        for index, (bottom, top) in enumerate(zip(bottoms, tops, strict=True))
        if top < bottom
    )


def enclosing_ticks(low: float, high: float) -> list[float]:
    """Return about five round numbers that enclose low and high."""
    if not high - low > 1e-9 * abs(high):
        low, high = min(0.0, low), max(0.0, high) or 1.0
    step = _round_step(0.999 * (high - low) / 4)
    first, last = math.floor(low / step + 1e-6), math.ceil(high / step - 1e-6)
    return [tick * step for tick in range(first, last + 1)]


def _round_step(least: float) -> float:
    """Return the smallest 1, 2 or 5 times a power of ten that is `least` or more."""
    magnitude = 10.0 ** math.floor(math.log10(least))
    steps = (factor * magnitude for factor in (1, 2, 5, 10))
    return next(step for step in steps if step >= least)


# --- how often answers are right, by how probable they are ---


def reliability_chart(before: Sequence[Bin], after: Sequence[Bin], text: Text) -> Chart:
    """Return the chart of right answers by their probability, before and after calibration.

    text: formats a share. The calibration errors are beside the names.
    """
    lines = [Line("as probable as right", "grey", "M0 1L1 0", [], "", False)]
    for name, colour, bins in (("before", "orange", before), ("after", "blue", after)):
        dots = [(each.confidence, 1 - each.right) for each in bins]
        total = sum(each.count for each in bins)
        radii = [max(2, round(LARGEST * math.sqrt(each.count / total))) for each in bins]
        error = text(calibration_error(bins))
        lines.append(Line(name, colour, "", dots, error, False, radii))
    columns: dict[int, list[str]] = {}
    for name, bins in (("before", before), ("after", after)):
        for each in bins:
            words = (
                f"{name} {text(each.confidence)} probable, {text(each.right)} right, {each.count}x"
            )
            columns.setdefault(int(place_of(each.confidence)), []).append(words)
    ticks = [number / 5 for number in range(6)]
    return Chart(
        "Right answers by their probability",
        x_ticks=[(tick, f"{tick:.0%}") for tick in ticks],
        y_ticks=[(1 - tick, f"{tick:.0%}") for tick in ticks],
        best=None,
        lines=lines,
        readouts=[
            Readout(place / BINS, 1 / BINS, " · ".join(said))
            for place, said in sorted(columns.items())
        ],
        along="by probability",
    )


# --- axes of values, parameters and choices ---


@dataclass(frozen=True)
class Axis:
    """An axis from `low` to `high`, as they are or (log) on a logarithmic scale.

    Of choices these are their numbers, with half a step around.
    """

    name: str
    low: float
    high: float
    log: bool
    ticks: Sequence[tuple[float, str]]  # where, from 0 at `low` to 1, and what it says
    choices: Sequence[Any] = ()

    def __call__(self, value: Any) -> float:
        """Return where a value lies, from 0 to 1."""
        if self.choices:
            value = self.choices.index(value)
        low, high, number = self.low, self.high, float(value)
        if self.log:
            low, high, number = math.log(low), math.log(high), math.log(number)
        return (number - low) / (high - low)


def choice_axis(name: str, choices: Sequence[Any], labels: Sequence[str]) -> Axis:
    """Return the axis of some choices, with a label for each."""
    count = len(choices)
    ticks = [((number + 0.5) / count, label) for number, label in enumerate(labels)]
    return Axis(name, -0.5, count - 0.5, False, ticks, choices)


def measured_axis(name: str, values: Iterable[float]) -> Axis:
    """Return the axis of measured values, with a margin."""
    finite = [value for value in values if math.isfinite(value)]
    low, high = min(finite, default=0.0), max(finite, default=1.0)
    room = 0.06 * (high - low) or 0.5
    return scale(name, low - room, high + room, log=False)


def share_axis(name: str, shares: Iterable[float]) -> Axis:
    """Return the axis of measured shares, in percent: nothing lies below 0 or above 100 %."""
    finite = [value for value in shares if math.isfinite(value)]
    low, high = min(finite, default=0.0), max(finite, default=1.0)
    room = max(0.06 * (high - low), 0.01)
    return scale(name, max(low - room, 0.0), min(high + room, 1.0), log=False, text=_whole_percent)


def _whole_percent(share: float) -> str:
    return f"{100 * share:.3g}%"


def scale(name: str, low: float, high: float, log: bool, text: Text = "{:.3g}".format) -> Axis:
    """Return an axis with ticks at powers of ten, or at about five round numbers.

    text: writes a value.
    """
    if log and high / low >= 100:
        first, last = math.ceil(math.log10(low) - 1e-9), math.floor(math.log10(high) + 1e-9)
        ticks = [10.0**power for power in range(first, last + 1)]
        ticks = ticks[:: math.ceil(len(ticks) / 7)]
    elif log:
        ticks = [low * (high / low) ** (number / 3) for number in range(4)]
    else:
        ticks = _ticks_within(low, high)
    axis = Axis(name, low, high, log, ())
    return Axis(name, low, high, log, [(axis(tick), text(tick)) for tick in ticks])


def _ticks_within(low: float, high: float) -> list[float]:
    """Return about three round numbers between low and high."""
    for parts in (4, 6, 10, 20):
        step = _round_step((high - low) / parts)
        first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
        if last - first >= 2:
            break
    return [number * step for number in range(first, last + 1)]
