"""The runs in a folder: their settings and figures, and the differences between two runs.

Read from the runs' files, without PyTorch.
"""

import csv
import dataclasses
import math
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from trainer.common import files
from trainer.common.errors import UserError
from trainer.common.objects import parsed
from trainer.common.paths import RENTED
from trainer.common.text import dollars, duration
from trainer.results.intervals import wilson_interval
from trainer.results.text import percent, setting
from trainer.settings import config as settings
from trainer.training.run import PREDICTIONS, read_result

COMPLETE, RUNNING, STOPPED = "complete", "running", "stopped"
CONFIG = "config.yaml"  # a run's settings
# Settings that the table shows in columns of their own: pictures, network and the run's name.
SHOWN_APART = ("data.source", "data.root", "model.name", "name")
LONGEST = 60  # characters of what differs


@dataclass(frozen=True)
class Summary:
    """A run, read from its directory.

    settings: by dotted key. valid, test: top-1 accuracies of the best epoch. pictures: number in
    test. interval: of `test`, at 95 %. seconds: of training and everything after it. curve: the
    accuracy on valid of each epoch. dollars: for machines; None: for the user's own. uri: its
    address in a bucket, if it has one.
    """

    path: Path
    state: str
    date: float  # of its last change, seconds since 1970
    settings: Mapping[str, Any]
    epochs: int | None
    valid: float | None
    test: float | None
    pictures: int
    interval: tuple[float, float] | None
    seconds: float | None
    curve: Sequence[tuple[int, float]] = ()
    dollars: float | None = None
    uri: str | None = None

    @property
    def place(self) -> str:
        """Where it is: its directory here, or its address in a bucket."""
        if self.uri is not None and not self.path.is_dir():
            return self.uri
        return str(self.path)

    @property
    def data(self) -> str:
        """The data set's name."""
        return settings.data_name(
            str(self.settings.get("data.source")), str(self.settings.get("data.root"))
        )


def find(root: Path) -> list[Summary]:
    """Return the runs below a directory, the newest first. Raise UserError where there is none."""
    if not root.is_dir():
        raise UserError(f"{root}: there is no such folder; a first run makes it (make train)")
    runs = [run for path in sorted(root.iterdir()) if (run := read(path)) is not None]
    return sorted(runs, key=lambda run: run.date, reverse=True)


def read(path: Path) -> Summary | None:
    """Read a run's directory; return None if it is none."""
    if not (path / CONFIG).is_file():
        return None
    with suppress(OSError, ValueError, OmegaConfBaseException, YAMLError):
        given = _flat(OmegaConf.to_container(OmegaConf.load(path / CONFIG)))
        rows = [row for row in _rows(path / "metrics.jsonl") if "valid_top1" in row]
        result = read_result(path) or {}  # {}: the run hasn't written it yet
        date = max(file.stat().st_mtime for file in path.iterdir() if file.is_file())
        state = COMPLETE
        if not result:
            state = RUNNING if _is_held(path) else STOPPED
        best = {row["epoch"]: row["valid_top1"] for row in rows}
        test, interval = None, None
        if result.get("split") == "test":
            test = float(result["top1"])
            interval = wilson_interval(round(test * result["pictures"]), result["pictures"])
        epoch = result.get("best_epoch", max(best, key=lambda each: best[each], default=None))
        rented = _rented(path)
        return Summary(
            path,
            state,
            date,
            given,
            epochs=max(best, default=0),
            valid=best.get(epoch),
            test=test,
            pictures=int(result.get("pictures", 0)),
            interval=interval,
            seconds=result.get("seconds"),
            curve=list(best.items()),
            dollars=rented.get("dollars") or result.get("dollars"),
            uri=rented.get("uri"),
        )
    return None


def _rented(path: Path) -> dict[str, Any]:
    """Return what `launch fetch` wrote about a run's origin; {}: nothing."""
    with suppress(OSError):
        return parsed((path / RENTED).read_bytes()) or {}
    return {}


def elsewhere(told: Mapping[str, Any]) -> Summary:
    """Return a run in a bucket, from `launch`'s plain data about it."""
    fields = dict(told)
    test, pictures = fields.get("test"), fields.get("pictures") or 0
    interval = None
    if test is not None and pictures:
        interval = wilson_interval(round(test * pictures), pictures)
    fields |= {"path": Path(fields.pop("name")), "pictures": pictures, "interval": interval}
    return Summary(**fields)


def together(here: Sequence[Summary], others: Sequence[Summary]) -> list[Summary]:
    """Return the runs of a folder and those of a bucket, each once, the newest first.

    A fetched run is shown as in the folder, with its current cost.
    """
    by_uri = {run.uri: run for run in others}
    kept = []
    for run in here:
        other = by_uri.pop(run.uri, None) if run.uri else None
        kept.append(run if other is None else dataclasses.replace(run, dollars=other.dollars))
    return sorted([*kept, *by_uri.values()], key=lambda run: run.date, reverse=True)


def _rows(path: Path) -> list[dict[str, Any]]:
    """Return the complete rows of metrics.jsonl."""
    with suppress(OSError):
        return [row for line in path.read_bytes().splitlines() if (row := parsed(line))]
    return []


def _is_held(path: Path) -> bool:
    """Return whether a process has this run."""
    try:
        return files.is_locked(path)
    except OSError:
        return False


def _flat(node: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(node, dict):
        return {prefix: node}
    found: dict[str, Any] = {}
    for key, value in node.items():
        found |= _flat(value, f"{prefix}.{key}" if prefix else str(key))
    return found


# --- the table ---


def differing(runs: Sequence[Summary]) -> list[str]:
    """Return the settings that decide a result and differ between these runs."""
    deciding = {key for key, entry in settings.schema().items() if entry.metadata["identity"]}
    keys = sorted({key for run in runs for key in run.settings} & deciding - {*SHOWN_APART})
    return [key for key in keys if len(set(_values(runs, key))) > 1]


def _values(runs: Sequence[Summary], key: str) -> list[str]:
    """Return a setting's values, from the runs that have it."""
    return [setting(run.settings[key]) for run in runs if key in run.settings]


def own_settings(runs: Sequence[Summary]) -> list[list[str]]:
    """Return, as words, the settings of each run that differ from most other runs."""
    keys = differing(runs)
    usual = {key: _usual(_values(runs, key)) for key in keys}
    return [
        [
            f"{key}={setting(run.settings[key])}"
            for key in keys
            if key in run.settings and setting(run.settings[key]) != usual[key]
        ]
        for run in runs
    ]


COLUMNS = (
    "date", "data", "model", "valid", "test", "95%", "epochs", "time", "dollars", "state", "run",
)  # fmt: skip
NAMES = ("run", "data", "model")  # columns that a narrow terminal shows on a line of their own


def table(runs: Sequence[Summary], width: int | None = None) -> str:
    """Return the table's header and a line for each run.

    There is a column of dollars if a run cost any. width: of the terminal, in characters. If a line
    would be longer, each run has several: figures, names, differing settings.
    """
    head = (*COLUMNS, "differs by")
    lines: list[tuple[str, ...]] = [head]
    for run, own in zip(runs, own_settings(runs), strict=True):
        lines.append((*cells(run), _cut(" ".join(own))))
    paid = any(run.dollars is not None for run in runs)
    shown = [name for name in head if name != "dollars" or paid]
    text = _aligned([tuple(line[head.index(name)] for name in shown) for line in lines])
    if width is None or max(map(len, text)) <= width:
        return "\n".join(text)
    figures = [name for name in shown if name not in (*NAMES, "differs by")]
    first = _aligned([tuple(line[head.index(name)] for name in figures) for line in lines])
    told = [first[0]]
    for line, begin in zip(lines[1:], first[1:], strict=True):
        told += [begin, "  " + "  ".join(line[head.index(name)] for name in NAMES)]
        if line[-1]:
            told.append(f"  differs by {line[-1]}")
    return "\n".join(told)


def _aligned(lines: Sequence[tuple[str, ...]]) -> list[str]:
    """Return the lines with aligned cells."""
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]) - 1)]
    padded = [
        "  ".join(
            [*(cell.ljust(width) for cell, width in zip(line, widths, strict=False)), line[-1]]
        )
        for line in lines
    ]
    return [line.rstrip() for line in padded]


def cells(run: Summary) -> tuple[str, ...]:
    """Return a run's cells of the table, up to its path."""
    interval, took = "", ""
    if run.interval is not None:
        low, high = run.interval
        interval = f"{100 * low:.0f} to {100 * high:.0f}"
    if run.seconds is not None:
        took = duration(run.seconds)
    return (
        time.strftime("%Y-%m-%d %H:%M", time.localtime(run.date)),
        run.data,
        str(run.settings.get("model.name")),
        _percent(run.valid),
        _percent(run.test),
        interval,
        "" if run.epochs is None else str(run.epochs),
        took,
        "" if run.dollars is None else dollars(run.dollars),
        run.state,
        run.place,
    )


def _percent(value: float | None) -> str:
    return "" if value is None else percent(value)


def _usual(values: Sequence[str]) -> str:
    """Return the most common value, the first of several: differences are relative to it."""
    return max(values, key=values.count)


def _cut(text: str) -> str:
    if len(text) <= LONGEST:
        return text
    return f"{text[: LONGEST - 1]}…"


# --- two runs ---


@dataclass(frozen=True)
class Comparison:
    """Two runs on the same test pictures.

    both, first, second, neither: number of pictures that both, one alone, or none had right. p: of
    the difference, if both were equally good.
    """

    both: int
    first: int
    second: int
    neither: int

    @property
    def pictures(self) -> int:
        """The number of pictures that they share."""
        return self.both + self.first + self.second + self.neither

    @property
    def p(self) -> float:
        """Return the probability of at least such a difference between equally good runs.

        McNemar's test, exact: of the pictures that one alone has right, half would be the first's
        (McNemar, "Note on the sampling error of the difference between correlated proportions",
        Psychometrika 12 (1947), 153-157).
        """
        alone = self.first + self.second
        fewer = min(self.first, self.second)
        tail = sum(math.comb(alone, count) for count in range(fewer + 1))
        return min(1.0, float(2 * tail / 2**alone))


def compare(first: Path, second: Path) -> Comparison:
    """Return how two runs differ on their test pictures. Raise UserError where they can't be.

    first, second: runs' directories, or those of `evaluate`.
    """
    right = [_right(path) for path in (first, second)]
    if right[0].keys() != right[1].keys():
        shared = len(right[0].keys() & right[1].keys())
        raise UserError(
            f"{first} and {second} were tested on different pictures ({len(right[0])} and "
            f"{len(right[1])}, {shared} of them the same); evaluate both on one folder: "
            "python -m serving evaluate RUN DIR"
        )
    pairs = [(hit, right[1][name]) for name, hit in right[0].items()]
    return Comparison(*(pairs.count(pair) for pair in _OUTCOMES))


_OUTCOMES = ((True, True), (True, False), (False, True), (False, False))


def _right(run: Path) -> dict[str, bool]:
    """Return for each picture whether a run had it right. Raise UserError."""
    path = run / PREDICTIONS
    try:
        with path.open(encoding="utf-8", newline="") as file:
            return {row["path"]: row["correct"] == "true" for row in csv.DictReader(file)}
    except FileNotFoundError as error:
        raise UserError(f"{run}: it has no {PREDICTIONS}; the run isn't complete") from error
    except (KeyError, csv.Error) as error:
        raise UserError(f"{path}: not a table of a run's predictions") from error
