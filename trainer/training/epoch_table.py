"""The epochs of a training as a table for a person at a terminal, with the time that is left.

A program reads the metric line instead (`settings.config.metric_line`).
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from trainer.common.console import painted
from trainer.common.text import duration

RECENT = 5  # epochs whose time the rest is taken to need; the first ones of a run are slower
HEAD = ("epoch", "train loss", "train", "valid loss", "valid", "top-5", "F1", "time", "left, about")
WIDTHS = (7, 11, 7, 11, 7, 7, 7, 8, 12)  # 77 columns in all: with the mark, a terminal of 80


class EpochTable:
    """Writes rows, one an epoch, below a head that is written once.

    epochs: how many there will be at most.
    """

    def __init__(self, epochs: int) -> None:
        self.epochs = epochs
        self._headed = False

    def row(self, rows: Sequence[Mapping[str, Any]], best: bool, after: float) -> str:
        """Return the text of the newest of `rows` of metrics.jsonl.

        best: whether it is the best until now. after: seconds that what comes behind the last epoch
        is expected to take.
        """
        newest = rows[-1]
        number = int(newest["epoch"])
        name = f"{number}/{self.epochs}"
        if number == 0:
            name = "head"  # solved, before anything is trained
        spent = newest.get("seconds")
        cells = (
            name,
            _number(newest.get("train_loss")),
            _percent(newest.get("train_top1")),
            _number(newest.get("valid_loss")),
            _percent(newest.get("valid_top1")),
            _percent(newest.get("valid_top5")),
            _percent(newest.get("valid_f1")),
            "" if spent is None else _seconds(spent),
            self._left(rows, after),
        )
        text = _line(cells)
        if best:
            text = painted(f"{text} *", "green")
        if self._headed:
            return text
        self._headed = True
        head = f"* the best so far\n{_line(HEAD)}"
        return f"{painted(head, 'soft')}\n{text}"

    def _left(self, rows: Sequence[Mapping[str, Any]], after: float) -> str:
        """Return how long the run will go on."""
        recent = [row["seconds"] for row in rows if "seconds" in row][-RECENT:]
        missing = self.epochs - int(rows[-1]["epoch"])
        if missing and not recent:
            return ""
        left = after
        if missing:
            left += missing * sum(recent) / len(recent)
        return duration(_rounded(left)) if left >= 1 else ""


def _rounded(seconds: float) -> float:
    """Return an estimate with no more digits than it deserves."""
    if seconds < 60:
        return float(round(seconds))
    return 10.0 * round(seconds / 10) if seconds < 600 else 60.0 * round(seconds / 60)


def _seconds(seconds: float) -> str:
    """Return in seconds, or as a clock shows minutes and hours."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes}:{rest:02d}"
    return f"{minutes // 60}:{minutes % 60:02d}:{rest:02d}"


def _line(cells: Sequence[str]) -> str:
    padded = (cell.rjust(width) for cell, width in zip(cells, WIDTHS, strict=True))
    return "".join(padded).rstrip()


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.3g}"


def _percent(value: float | None) -> str:
    if value is None or not math.isfinite(value):
        return ""
    return f"{value:.1%}"
