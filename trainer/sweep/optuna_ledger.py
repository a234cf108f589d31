"""Trials chosen by Optuna, asked and told one by one.

They are kept in its own journal, which optuna-dashboard opens as it is.
"""

import hashlib
import json
from pathlib import Path
from typing import Any

import optuna
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend, JournalFileOpenLock
from optuna.trial import TrialState

from trainer.settings.search_space import Continuous, Integer, Parameter, Sweep
from trainer.settings.words import Value
from trainer.sweep.ledger import COMPLETE, FAILED, PRUNED, RUNNING, Trial, mend

STATES = {
    TrialState.RUNNING: RUNNING,
    TrialState.COMPLETE: COMPLETE,
    TrialState.PRUNED: PRUNED,
    TrialState.FAIL: FAILED,
}
SAMPLERS: dict[str, Any] = {
    "tpe": optuna.samplers.TPESampler,
    "random": optuna.samplers.RandomSampler,
}
PRUNERS: dict[str, Any] = {
    "none": optuna.pruners.NopPruner,
    "median": optuna.pruners.MedianPruner,
    "halving": lambda: optuna.pruners.SuccessiveHalvingPruner(min_resource=1),
}


class _Held(JournalFileOpenLock):
    """The driver has locked the sweep's directory.

    Optuna's own lock outlives a killed process for 30 s.
    """

    def acquire(self) -> bool:
        return True

    def release(self) -> None:
        pass


class Optuna:
    """A `ledger.Ledger`.

    With one trial at a time the trials are a function of the sweep's seed alone, however often it
    is killed.
    """

    def __init__(self, path: Path, sweep: Sweep) -> None:
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        mend(path)
        self.sweep = sweep
        self.study = optuna.create_study(
            storage=JournalStorage(JournalFileBackend(str(path), _Held(str(path)))),
            study_name="sweep",
            direction="minimize" if sweep.minimize else "maximize",
            pruner=PRUNERS[sweep.pruner](),
            load_if_exists=True,
        )
        # A kill may have come between a trial's beginning and the choice of its last value.
        self._running = {
            frozen.number: self._choose(optuna.trial.Trial(self.study, frozen._trial_id))
            for frozen in self.study.get_trials(states=[TrialState.RUNNING])
        }

    def trials(self) -> list[Trial]:
        return [self._ours(frozen) for frozen in self.study.get_trials(deepcopy=False)]

    def ask(self) -> Trial | None:
        if len(self.study.get_trials(deepcopy=False)) >= self.sweep.trials:
            return None
        trial = self._choose(self.study.ask())
        self._running[trial.number] = trial
        return self.trials()[trial.number]

    def report(self, number: int, epoch: int, value: float) -> bool:
        trial = self._running[number]
        if epoch not in self.study.get_trials(deepcopy=False)[number].intermediate_values:
            trial.report(value, epoch)
        return trial.should_prune()

    def tell(self, number: int, state: str, value: float | None = None, reason: str = "") -> None:
        trial = self._running.pop(number)
        if reason:
            trial.set_user_attr("reason", reason)
        outcome = next(theirs for theirs, ours in STATES.items() if ours == state)
        self.study.tell(trial, value if state == COMPLETE else None, state=outcome)

    def _choose(self, trial: optuna.trial.Trial) -> optuna.trial.Trial:
        """Choose values for those parameters that have none yet.

        Each is drawn from a stream of its own, so that a kill in between changes none.
        """
        for parameter in self.sweep.space:
            seed = hashlib.sha256(
                f"{self.sweep.seed}/{trial.number}/{parameter.key}".encode()
            ).digest()[:4]
            self.study.sampler = SAMPLERS[self.sweep.sampler](seed=int.from_bytes(seed, "big"))
            if isinstance(parameter, Continuous):
                trial.suggest_float(parameter.key, parameter.low, parameter.high, log=parameter.log)
            elif isinstance(parameter, Integer):
                trial.suggest_int(parameter.key, parameter.low, parameter.high, log=parameter.log)
            else:
                trial.suggest_categorical(
                    parameter.key, [stored(choice) for choice in parameter.choices]
                )
        return trial

    def _ours(self, frozen: optuna.trial.FrozenTrial) -> Trial:
        params = {
            parameter.key: value(parameter, frozen.params[parameter.key])
            for parameter in self.sweep.space
            if parameter.key in frozen.params
        }
        return Trial(
            frozen.number,
            params,
            STATES[frozen.state],
            frozen.value,
            frozen.user_attrs.get("reason", ""),
        )


def stored(choice: Value) -> bool | int | float | str | None:
    """Return a choice as Optuna keeps it: its storage takes scalars only, so a list is JSON."""
    return json.dumps(choice) if isinstance(choice, list) else choice


def value(parameter: Parameter, theirs: Any) -> Value:
    """Return the value that Optuna chose, as the setting has it."""
    if isinstance(parameter, Continuous | Integer):
        chosen: Value = theirs
        return chosen
    return next(choice for choice in parameter.choices if stored(choice) == theirs)
