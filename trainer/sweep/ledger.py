"""What a sweep has tried: every trial with its number, values and outcome.

It is on the disk before anything is done about it.

`Grid` and `optuna_ledger.Optuna` are the two ways to choose the next trial. A trial that was begun
stays begun: after a kill it is found again under its number with its values, so that nothing is
lost, repeated or renumbered.
"""

import itertools
import json
import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

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
    reason: str = ""  # why it failed


class Ledger(Protocol):
    """Chooses the trials and remembers them, on the disk."""

    def trials(self) -> list[Trial]:
        """Return every trial begun, by number."""

    def ask(self) -> Trial | None:
        """Begin the next trial and return it; None: no trial is left."""

    def report(self, number: int, epoch: int, value: float) -> bool:
        """Note the objective after an epoch (from 1); return whether the trial should end here."""

    def tell(self, number: int, state: str, value: float | None = None, reason: str = "") -> None:
        """Note a trial's outcome."""


class Grid:
    """Every combination, the last key fastest.

    Its journal has one JSON object a line, the last one of a trial counts.
    """

    def __init__(self, path: Path, sweep: Sweep) -> None:
        keys = [parameter.key for parameter in sweep.space]
        points = itertools.product(
            *(space.grid(parameter, sweep.points) for parameter in sweep.space)
        )
        self.points = [dict(zip(keys, values, strict=True)) for values in points]
        self._path = path
        self._trials: dict[int, Trial] = {}
        mend(path)
        for line in path.read_text().splitlines():
            entry = json.loads(line)
            self._trials[entry["number"]] = Trial(params=self.points[entry["number"]], **entry)

    def trials(self) -> list[Trial]:
        return [self._trials[number] for number in sorted(self._trials)]

    def ask(self) -> Trial | None:
        number = len(self._trials)
        if number == len(self.points):
            return None
        return self._note(Trial(number, self.points[number]))

    def report(self, number: int, epoch: int, value: float) -> bool:
        return False

    def tell(self, number: int, state: str, value: float | None = None, reason: str = "") -> None:
        self._note(replace(self._trials[number], state=state, value=value, reason=reason))

    def _note(self, trial: Trial) -> Trial:
        entry = {
            "number": trial.number,
            "state": trial.state,
            "value": trial.value,
            "reason": trial.reason,
        }
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(entry) + "\n")
            file.flush()
            os.fsync(file.fileno())
        self._trials[trial.number] = trial
        return trial


def mend(path: Path) -> None:
    """Make the journal, or cut off the line that a power cut has torn.

    Nothing was done about that line yet.
    """
    with path.open("ab+") as file:
        file.seek(0)
        data = file.read()
        file.truncate(data.rfind(b"\n") + 1)


def best_first(trials: list[Trial], sweep: Sweep) -> list[Trial]:
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
