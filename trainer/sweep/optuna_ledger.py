"""Trials chosen by Optuna, asked and told one by one.

They are kept in its own journal, which optuna-dashboard opens as it is, or in a database
(`sweep.storage`).

Several drivers may share one. Each writes a heartbeat, and its name on the trials that it runs. A
driver that was silent for `sweep.lost_seconds`, by the other drivers' clocks, counts as lost:
another driver writes its own name on the trial and continues it. If two do so, the last name
counts, and the other driver ends its process when it reads that. Each outcome is written once:
Optuna's storages refuse to change a finished trial.
"""

import hashlib
import json
import re
import socket
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import wraps
from pathlib import Path
from typing import Any, TypeVar, cast

import optuna
from optuna.distributions import BaseDistribution
from optuna.exceptions import StorageInternalError, UpdateFinishedTrialError
from optuna.storages import BaseStorage, JournalStorage, RDBStorage
from optuna.storages.journal import (
    JournalFileBackend,
    JournalFileOpenLock,
    JournalFileSymlinkLock,
)
from optuna.trial import FrozenTrial, TrialState
from sqlalchemy.exc import ArgumentError, SQLAlchemyError

from trainer.common.errors import AGAIN, MachineFault, UserError
from trainer.common.files import PAUSES
from trainer.common.objects import parsed
from trainer.settings.search_space import Continuous, Integer, Parameter, Sweep
from trainer.settings.words import Value
from trainer.sweep.ledger import COMPLETE, FAILED, PRUNED, RUNNING, Trial, grid_points, mend

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
LOOK = 1.0  # seconds between two reads of what other drivers have written
GONE = 0  # written instead of a time by a driver that has left

F = TypeVar("F", bound=Callable[..., Any])


def reached(method: F) -> F:
    """Raise MachineFault where the ledger's storage does not answer."""

    @wraps(method)
    def checked(self: "Optuna", *arguments: Any, **named: Any) -> Any:
        try:
            return method(self, *arguments, **named)
        except (SQLAlchemyError, StorageInternalError) as error:
            raise MachineFault(unreachable(self.storage, error)) from error

    return cast(F, checked)


@dataclass(frozen=True)
class Driver:
    """A driver that shares its ledger with others."""

    name: str  # of its own, also when it is started again
    sweep: str  # the sweep's identity: all drivers' must be equal
    runs: Path  # where the directories of its trials lie
    lost_seconds: float


@dataclass
class Watch:
    """How long a driver was silent while this one listened."""

    sign: int | None  # what it wrote last
    looked: float  # time.monotonic
    seconds: float = 0.0


class _Alone(JournalFileOpenLock):
    """The driver has locked the sweep's directory.

    Optuna's own lock outlives a killed process for 30 s.
    """

    def __init__(self, path: Path) -> None:
        super().__init__(str(path))
        self._path = path

    def acquire(self) -> bool:
        mend(self._path)
        return True

    def release(self) -> None:
        pass


class _Shared(JournalFileSymlinkLock):
    """Held while a line is written, also on a network file system.

    An incomplete line of an earlier writer is removed first.
    """

    def __init__(self, path: Path) -> None:
        super().__init__(str(path))
        self._path = path

    def acquire(self) -> bool:
        super().acquire()
        mend(self._path)
        return True

    def release(self) -> None:
        with suppress(RuntimeError):  # it was held for so long that another one broke it
            super().release()


class _Point(optuna.samplers.BaseSampler):
    """A sampler that gives a trial the values of its grid point."""

    def __init__(self, values: dict[str, Value]) -> None:
        self._values = values

    def infer_relative_search_space(
        self, study: optuna.Study, trial: FrozenTrial
    ) -> dict[str, BaseDistribution]:
        return {}

    def sample_relative(
        self, study: optuna.Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        return {}

    def sample_independent(
        self,
        study: optuna.Study,
        trial: FrozenTrial,
        param_name: str,
        param_distribution: BaseDistribution,
    ) -> Any:
        return stored(self._values[param_name])


class Optuna:
    """A `ledger.Ledger`.

    With one trial at a time, the trials depend on the sweep's seed alone, however often it is
    killed.
    """

    def __init__(
        self, storage: str | Path, sweep: Sweep, name: str = "sweep", driver: Driver | None = None
    ) -> None:
        """Open the ledger, or begin it.

        storage: a journal's path, or a database's URL. name: of the study. driver: this one, where
        it shares the ledger. Raises UserError if the ledger belongs to another sweep or is damaged,
        and MachineFault if it can't be reached.
        """
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self.storage, self.sweep, self._driver = storage, sweep, driver
        self.points: list[dict[str, Value]] = []
        self.total = sweep.trials
        if sweep.engine == "grid":
            self.points = grid_points(sweep)
            self.total = len(self.points)
        self._known: list[FrozenTrial] = []
        self._looked = self._beaten = -float("inf")
        self._watched: dict[str | int, Watch] = {}
        self.study = optuna.create_study(
            storage=opened(storage, shared=driver is not None),
            study_name=name,
            direction="minimize" if sweep.minimize else "maximize",
            pruner=PRUNERS[sweep.pruner](),
            load_if_exists=True,
        )
        if driver is not None:
            self._join(driver)
        self._running = {
            # A kill may have come after a trial began, and before its last value was chosen.
            frozen.number: self._choose(optuna.trial.Trial(self.study, frozen._trial_id))
            for frozen in self._frozen()
            if frozen.state == TrialState.RUNNING
            and (driver is None or frozen.user_attrs.get("driver") == driver.name)
        }

    @reached
    def trials(self) -> list[Trial]:
        return [self._ours(frozen) for frozen in self._frozen()]

    @reached
    def ask(self) -> Trial | None:
        taken = self._free()
        if taken is None:
            if len(self._frozen()) >= self.total:
                return None
            taken = self.study.ask()
            self._write_name(taken)
            if taken.number >= self.total:
                # Another driver has begun the last trial at the same moment. This extra one has
                # no driver, and waits for a larger sweep.trials.
                return None
        self._running[taken.number] = self._choose(taken)
        self._looked = -float("inf")
        return self.trials()[taken.number]

    def holds(self, number: int) -> bool:
        return number in self._running

    @reached
    def report(self, number: int, epoch: int, value: float) -> bool:
        if not self.holds(number) or self.points:
            return False
        trial = self._running[number]
        with suppress(UpdateFinishedTrialError):
            if epoch not in self._frozen()[number].intermediate_values:
                trial.report(value, epoch)
                self._looked = -float("inf")
            return trial.should_prune()
        return False

    @reached
    def note(self, number: int, reason: str) -> None:
        if self.holds(number):
            with suppress(UpdateFinishedTrialError):
                self._running[number].set_user_attr("reason", reason)
            self._looked = -float("inf")

    @reached
    def tell(self, number: int, state: str, value: float | None = None, reason: str = "") -> None:
        if not self.holds(number):
            return
        self.note(number, reason)
        outcome = next(theirs for theirs, ours in STATES.items() if ours == state)
        given = value if state == COMPLETE else None
        with suppress(UpdateFinishedTrialError):
            self.study.tell(self._running[number], given, state=outcome, skip_if_finished=True)
        del self._running[number]
        self._looked = -float("inf")

    @reached
    def beat(self) -> None:
        if self._driver is None:
            return
        every = min(self._driver.lost_seconds / 6, 10)
        if time.monotonic() - self._beaten > every:
            self._sign(time.time_ns())
        for frozen in self._frozen():
            taken = frozen.user_attrs.get("driver") != self._driver.name
            if frozen.number in self._running and (taken or frozen.state.is_finished()):
                del self._running[frozen.number]

    @reached
    def leave(self) -> None:
        if self._driver is not None:
            self._sign(GONE)

    def _join(self, driver: Driver) -> None:
        """Record the sweep's identity. Raise UserError if the ledger belongs to another sweep."""
        then = self.study.user_attrs.get("sweep")
        if then is None:
            self.study.set_user_attr("sweep", driver.sweep)
        elif then != driver.sweep:
            raise UserError(
                f"{shown(self.storage)}: the sweep {self.study.study_name} there is another one, "
                f"of {then}, and this one is of {driver.sweep}; give the same settings and "
                "pictures, or another name=..."
            )
        self._sign(time.time_ns())

    def _sign(self, sign: int) -> None:
        """Write that this driver lives, or is gone."""
        assert self._driver is not None
        self.study.set_user_attr(f"driver {self._driver.name}", sign)
        self._beaten = time.monotonic()

    def _write_name(self, trial: optuna.trial.Trial) -> None:
        """Write on a trial that this driver runs it."""
        if self._driver is not None:
            trial.set_user_attr("driver", self._driver.name)
            place = self._driver.runs.absolute() / f"{trial.number:04d}"
            trial.set_user_attr("where", f"{socket.gethostname()}:{place}")
            self._looked = -float("inf")

    def _free(self) -> optuna.trial.Trial | None:
        """Take over a running trial whose driver is gone; None: there is none."""
        if self._driver is None:
            return None
        signs = self.study.user_attrs
        for frozen in self._frozen():
            if frozen.state != TrialState.RUNNING or frozen.number in self._running:
                continue
            name = frozen.user_attrs.get("driver")
            # Without a name: its driver was killed before it wrote one.
            if self._is_silent(
                frozen.number if name is None else name, signs.get(f"driver {name}")
            ):
                trial = optuna.trial.Trial(self.study, frozen._trial_id)
                with suppress(UpdateFinishedTrialError):
                    self._write_name(trial)
                    return trial
        return None

    def _is_silent(self, who: str | int, sign: int | None) -> bool:
        """Return whether a driver has been silent for too long while this one listened.

        This driver's own sleep doesn't count: it first reads what it missed.
        """
        assert self._driver is not None
        now = time.monotonic()
        watch = self._watched.get(who)
        if sign == GONE or (isinstance(who, str) and who == self._driver.name):
            return True
        if watch is None or watch.sign != sign:
            self._watched[who] = Watch(sign, now)
            return False
        watch.seconds += min(now - watch.looked, 2 * LOOK)
        watch.looked = now
        return watch.seconds > self._driver.lost_seconds

    def _frozen(self) -> list[FrozenTrial]:
        """Return the sweep's trials from the storage.

        Other drivers' newest entries may be missing: the storage isn't read every time.
        """
        if self._driver is None or time.monotonic() - self._looked > LOOK:
            self._known = self.study.get_trials(deepcopy=False)[: self.total]
            self._looked = time.monotonic()
        return self._known

    def _choose(self, trial: optuna.trial.Trial) -> optuna.trial.Trial:
        """Choose values for those parameters that have none yet.

        Each is drawn from a stream of its own, so that a kill in between changes none.
        """
        for parameter in self.sweep.space:
            self.study.sampler = self._sampler(trial.number, parameter)
            if isinstance(parameter, Continuous):
                trial.suggest_float(parameter.key, parameter.low, parameter.high, log=parameter.log)
            elif isinstance(parameter, Integer):
                trial.suggest_int(parameter.key, parameter.low, parameter.high, log=parameter.log)
            else:
                trial.suggest_categorical(
                    parameter.key, [stored(choice) for choice in parameter.choices]
                )
        return trial

    def _sampler(self, number: int, parameter: Parameter) -> optuna.samplers.BaseSampler:
        if self.points:
            return _Point(self.points[number])
        text = f"{self.sweep.seed}/{number}/{parameter.key}"
        seed = int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "big")
        sampler: optuna.samplers.BaseSampler = SAMPLERS[self.sweep.sampler](seed=seed)
        return sampler

    def _ours(self, frozen: FrozenTrial) -> Trial:
        params = {
            parameter.key: value(parameter, frozen.params[parameter.key])
            for parameter in self.sweep.space
            if parameter.key in frozen.params
        }
        where = ""
        if self._driver is not None:
            theirs = frozen.user_attrs.get("driver", "").split("/")[0]
            if theirs != self._driver.name.split("/")[0]:
                where = frozen.user_attrs.get("where", "")
        return Trial(
            frozen.number,
            params,
            STATES[frozen.state],
            frozen.value,
            frozen.user_attrs.get("reason", ""),
            where,
        )


# --- the storage ---


def opened(storage: str | Path, shared: bool) -> BaseStorage:
    """Return the storage, made if it is new. Raise UserError, and MachineFault as `reached`."""
    if "://" not in str(storage):
        return _journal(Path(storage), shared)
    for pause in (*PAUSES, None):
        try:
            return RDBStorage(str(storage), engine_kwargs={"pool_pre_ping": True})
        except ArgumentError as error:
            raise UserError(
                f"sweep.storage={shown(storage)} is no database's URL "
                f"({first_line(error)}); allowed: postgresql://USER:PASSWORD@HOST/DATABASE, what "
                "else SQLAlchemy knows, or the path of a file"
            ) from error
        except ImportError as error:
            missing = getattr(error.__cause__ or error, "name", None) or first_line(error)
            raise UserError(
                f"sweep.storage={shown(storage)} needs {missing}: install it with pip"
            ) from error
        except (SQLAlchemyError, StorageInternalError) as error:
            # Two drivers that make the tables at the same time disturb each other.
            if pause is None:
                raise MachineFault(unreachable(storage, error)) from error
            time.sleep(pause)
    raise AssertionError


def _journal(path: Path, shared: bool) -> BaseStorage:
    lock: _Alone | _Shared = _Alone(path)
    if shared:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = _Shared(path)
    lock.acquire()  # which makes and repairs it
    try:
        lines = path.read_bytes().splitlines()
    finally:
        lock.release()
    for number, line in enumerate(lines, 1):
        if parsed(line) is None:
            raise UserError(
                f"{path}: line {number} is damaged; restore a copy, or keep what is before it "
                f"(head -n {number - 1}): trials noted after it are begun again"
            )
    return JournalStorage(JournalFileBackend(str(path), lock))


def shown(storage: str | Path) -> str:
    """Return a storage's name without its password."""
    return re.sub(r"(://[^:/@]*):[^/]*@", r"\1:...@", str(storage))


def unreachable(storage: str | Path, error: Exception) -> str:
    """Return the line for a storage that doesn't answer."""
    reason = first_line(error.__cause__ or error)
    return f"sweep.storage={shown(storage)}: it does not answer ({reason}): fix that, {AGAIN}"


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message."""
    return (str(error).splitlines() or [type(error).__name__])[0]


# --- values ---


def stored(choice: Value) -> bool | int | float | str | None:
    """Return a choice as Optuna keeps it: its storage takes scalars only, so a list is JSON."""
    return json.dumps(choice) if isinstance(choice, list) else choice


def value(parameter: Parameter, theirs: Any) -> Value:
    """Return the value that Optuna chose, as the setting has it."""
    if isinstance(parameter, Continuous | Integer):
        chosen: Value = theirs
        return chosen
    return next(choice for choice in parameter.choices if stored(choice) == theirs)
