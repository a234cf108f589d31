"""A sweep's record: every trial with its number, values and outcome.

Each entry is on the disk before the driver acts on it.

There are two kinds: `Grid` is one driver's file, and needs nothing installed.
`optuna_ledger.Optuna` uses Optuna's storages; it chooses by earlier outcomes, and several drivers
can share it. After a kill, a begun trial is found again with its number and values, so no trial is
lost, repeated or renumbered.
"""

import itertools
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

from trainer.common.console import log
from trainer.common.errors import naming
from trainer.settings import search_space as space
from trainer.settings.search_space import Sweep
from trainer.settings.words import Value

RUNNING, COMPLETE, PRUNED, FAILED = "running", "complete", "pruned", "failed"


@dataclass(frozen=True)
class Trial:
    """One point of the search space, and what has come of it."""

    number: int  # from 0
    params: dict[str, Value]  # of each swept key
    state: str = RUNNING
    value: float | None = None  # of the objective; None: not known (yet)
    # Why it failed; for a running trial, why the machine failed its last try.
    reason: str = ""
    where: str = ""  # HOST:DIRECTORY of its run, where that isn't in this sweep's directory


class Ledger(Protocol):
    """Chooses the trials and remembers them, on the disk."""

    total: int  # how many trials there are to be

    def trials(self) -> list[Trial]:
        """Return every trial begun, by number."""

    def ask(self) -> Trial | None:
        """Begin the next trial, or take over one whose driver is gone, and return it.

        None: there is none now.
        """

    def holds(self, number: int) -> bool:
        """Return whether this trial is running, and this driver is the one to run it."""

    def report(self, number: int, epoch: int, value: float) -> bool:
        """Record the objective of an epoch (from 1); return whether the trial should end here."""

    def note(self, number: int, reason: str) -> None:
        """Record why a running trial has to be tried again."""

    def tell(self, number: int, state: str, value: float | None = None, reason: str = "") -> None:
        """Record a trial's outcome, if this driver holds the trial."""

    def beat(self) -> None:
        """Show other drivers that this one lives. Call it regularly."""

    def leave(self) -> None:
        """Let other drivers take over this one's trials at once."""


class Grid:
    """Every combination, the last key fastest.

    Its journal has one JSON object a line; a trial's last one counts. If a line is damaged, its
    trial starts again, and finds its run.
    """

    def __init__(self, path: Path, sweep: Sweep) -> None:
        self.points = grid_points(sweep)
        self.total = len(self.points)
        self._path = path
        self._trials: dict[int, Trial] = {}
        mend(path)
        for number, line in enumerate(path.read_bytes().splitlines(), 1):
            try:
                entry = json.loads(line)
                self._trials[entry["number"]] = Trial(params=self.points[entry["number"]], **entry)
            except (ValueError, TypeError, LookupError):
                log.warning("%s: line %d is damaged: skipping it", path, number)

    def trials(self) -> list[Trial]:
        return [self._trials[number] for number in sorted(self._trials)]

    def ask(self) -> Trial | None:
        for number, params in enumerate(self.points):
            if number not in self._trials:
                return self._note(Trial(number, params))
        return None

    def holds(self, number: int) -> bool:
        return self._trials[number].state == RUNNING

    def report(self, number: int, epoch: int, value: float) -> bool:
        return False

    def note(self, number: int, reason: str) -> None:
        self._note(replace(self._trials[number], reason=reason))

    def tell(self, number: int, state: str, value: float | None = None, reason: str = "") -> None:
        if self.holds(number):
            self._note(replace(self._trials[number], state=state, value=value, reason=reason))

    def beat(self) -> None:
        """Do nothing: there is no other driver."""

    def leave(self) -> None:
        """Do nothing, as above."""

    def _note(self, trial: Trial) -> Trial:
        entry = {
            "number": trial.number,
            "state": trial.state,
            "value": trial.value,
            "reason": trial.reason,
        }
        mend(self._path)
        with naming(self._path), self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(entry) + "\n")
            file.flush()
            os.fsync(file.fileno())
        self._trials[trial.number] = trial
        return trial


def grid_points(sweep: Sweep) -> list[dict[str, Value]]:
    """Return the values of each trial of a grid, the last key fastest."""
    keys = [parameter.key for parameter in sweep.space]
    values = (space.grid(parameter, sweep.points) for parameter in sweep.space)
    return [dict(zip(keys, point, strict=True)) for point in itertools.product(*values)]


def mend(path: Path) -> None:
    """Make the journal, or remove an incomplete last line, left by a power cut or a full disk.

    The driver hadn't acted on that line yet.
    """
    with naming(path), path.open("ab+") as file:
        end = file.tell()
        file.seek(max(end - 1, 0))
        if file.read() not in (b"", b"\n"):
            file.seek(0)
            file.truncate(file.read().rfind(b"\n") + 1)


def best_first(trials: Sequence[Trial], sweep: Sweep) -> list[Trial]:
    """Return the trials, the best first; those that ended early or failed last."""
    sign = 1 if sweep.minimize else -1
    order = {COMPLETE: 0, PRUNED: 1, RUNNING: 2, FAILED: 3}
    return sorted(
        trials,
        key=lambda trial: (
            order[trial.state],
            sign * trial.value if trial.value is not None else 0.0,
            trial.number,
        ),
    )


def best_of(ranked: Sequence[Trial], total: int) -> Trial | None:
    """Return the best trial, None where none may be called so.

    Where more than half of the trials failed, what is left says little of the space.

    ranked: of `best_first`. total: how many trials there are to be.
    """
    failed = sum(trial.state == FAILED for trial in ranked)
    if not ranked or ranked[0].state != COMPLETE or 2 * failed > total:
        return None
    return ranked[0]
