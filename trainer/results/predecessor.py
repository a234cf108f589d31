"""The previous run: the newest complete one on the same data set, for comparison."""

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trainer.common.errors import UserError
from trainer.results import runs
from trainer.results.text import setting
from trainer.training.run import PREDICTIONS, RESULT

LOOKED_AT = 30  # of the newest runs: reading the settings of thousands would take a while
SURE = 0.05  # p-value below which a difference counts


@dataclass(frozen=True)
class Predecessor:
    """The previous run, compared with this one.

    changed: setting, its value then, and now. verdict: the comparison in words; "" if they were
    tested on other pictures.
    """

    name: str
    summary: runs.Summary
    changed: list[tuple[str, str, str]]
    verdict: str


def find(directory: Path, data: str, config: Mapping[str, Any]) -> Predecessor | None:
    """Return the run before that of `directory` on a data set; None: it is the first.

    data: the data set's name. config: the settings that decide this run's result. Runs that can't
    be read are skipped: a comparison is no reason to fail.
    """
    with suppress(OSError, ValueError):
        return _newest(directory, data, config)
    return None


def _newest(directory: Path, data: str, config: Mapping[str, Any]) -> Predecessor | None:
    others = [path for path in directory.parent.iterdir() if path.name != directory.name]
    complete = [path for path in others if (path / RESULT).is_file()]
    newest = sorted(complete, key=lambda path: (path / RESULT).stat().st_mtime, reverse=True)
    for path in newest[:LOOKED_AT]:
        summary = runs.read(path)
        if summary is None or summary.test is None or summary.data != data:
            continue
        return Predecessor(path.name, summary, _changed(summary, config), verdict(path, directory))
    return None


def _changed(before: runs.Summary, config: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    pairs = [
        (key, setting(before.settings.get(key)), setting(value)) for key, value in config.items()
    ]
    return [each for each in pairs if each[1] != each[2]]


def verdict(before: Path, now: Path) -> str:
    """Return the comparison of two runs on their test pictures; "" if it is impossible.

    now: the run whose predictions are written already.
    """
    if not (now / PREDICTIONS).is_file():
        return ""
    try:
        result = runs.compare(before, now)
    except UserError:
        return ""
    points = 100 * (result.second - result.first) / result.pictures
    alone = f"{result.second} pictures right that the run before had wrong, {result.first} lost"
    if result.first + result.second == 0:
        return "The same pictures are right."
    if result.p > SURE:
        return (
            f"{points:+.1f} points, not distinguishable on {result.pictures} pictures: {alone}, "
            f"which chance alone gives in {result.p:.0%} of cases."
        )
    return f"{points:+.1f} points: {alone}, which chance alone seldom gives."
