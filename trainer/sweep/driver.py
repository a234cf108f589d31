"""`python -m trainer -m ...`: the driver of a sweep.

It trains nothing itself: it starts trials as processes and records their outcomes.

A sweep's directory is platform.runs/NAME. It has `sweep.json` (the request), `source/` (the code
and conf/ at the start, which every trial uses), the ledger, `sweep.html`, a directory for each
trial, which is an ordinary run, and `aside/` for trials that the ledger doesn't list. You may kill
the driver at any moment and start it again.
"""

import dataclasses
import json
import math
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import nullcontext, suppress
from itertools import count
from pathlib import Path
from typing import Any, TypeVar

from omegaconf import OmegaConf

from trainer.common import files
from trainer.common.command import one_line
from trainer.common.console import ProgressBar, command, log
from trainer.common.cpu import cores
from trainer.common.errors import (
    MISTAKE,
    OK,
    Interrupted,
    MachineFault,
    UserError,
    is_machines,
    naming,
    needed_by,
)
from trainer.common.interrupt import Stop, on_signals, on_spot_notice
from trainer.common.objects import parsed
from trainer.common.paths import ARCHIVE
from trainer.settings import config as settings
from trainer.settings import search_space as space
from trainer.settings import words
from trainer.settings.compose import CONF, compose, explain_settings, first_trial, resolve
from trainer.settings.config import AUTO, Config
from trainer.settings.hydra_errors import CONFIG_ERRORS
from trainer.settings.search_space import Sweep
from trainer.sweep import page, process
from trainer.sweep.directory import Directory, opened
from trainer.sweep.faults import Fault, Whose
from trainer.sweep.ledger import (
    COMPLETE,
    FAILED,
    PRUNED,
    RUNNING,
    Grid,
    Ledger,
    Trial,
    best_first,
    best_of,
)
from trainer.sweep.pictures import Pictures, are_swept
from trainer.sweep.process import Program, Request, TrialProcess, Worker, in_use
from trainer.training import recipe
from trainer.training.run import read_result

T = TypeVar("T")

POLL = 0.05  # seconds between two checks of the trials
# Seconds before the next tries, after the machine failed. So a trial is tried three times.
PAUSES = (10.0, 60.0)
# A machine is given up where it failed two trials in a row so often, or four that may be to blame
# themselves.
DOUBTS = {Whose.MACHINE: 2, Whose.OPEN: 1}
ENOUGH = 4
ASIDE = "aside"
# Settings that each trial has of its own; the sweep's command line can't give them.
OWN = ("platform.run_dir", "platform.checkpoints", "platform.package")


def run(arguments: list[str]) -> None:
    """Run the sweep of a command line's overrides, from its current state to its end.

    Raises Interrupted when asked to stop.
    """
    fixed, swept = space.split(arguments)
    for word in filter(words.is_one_path, arguments):
        log.info("%s: taken as one path, because it exists; put several in quotes: 'a','b'", word)
    config, notes = base(CONF, fixed, swept)
    for line in notes:
        log.info(line)
    for line in settings.ignored(config, arguments, sweep=True):
        log.warning(line)
    for word in fixed:
        if words.key_of(word) in OWN:
            log.warning("%s has no effect in a sweep: each trial has a directory of its own", word)
    notice = on_spot_notice if config.platform.name == "ec2" else lambda stop: nullcontext()
    with on_signals() as stop, opened(config, fixed, swept, stop) as directory, notice(stop):
        Driver(directory, fixed, stop).run()


def base(conf: Path, fixed: list[str], swept: dict[str, str]) -> tuple[Config, list[str]]:
    """Return the settings of a sweep's first trial, and the notes on what was implied (`resolve`).

    They have the first value of each list.
    """
    resolved = resolve(first_trial(fixed, swept, conf), conf)
    return settings.load(resolved.composed), resolved.notes


class Driver:
    """Starts a sweep's trials as processes, and records their outcomes."""

    def __init__(self, directory: Directory, fixed: list[str], stop: Stop) -> None:
        self.directory, self.frozen, self.stop = directory.path, directory.frozen, stop
        # Neither the sweep's own settings nor the places that its trials would share are for the
        # trials.
        self.fixed = [
            word for word in fixed if words.key_of(word).split(".")[0] not in ("sweep", "name")
        ]
        ranges = self.frozen["ranges"]
        self.config = base(self.directory / "source" / "conf", fixed, ranges)[0]
        self.sweep = space.load(self.config, ranges, fixed)
        self.pictures: Pictures | None = None  # of all trials, where these don't choose others
        if not are_swept(self.sweep):
            self.pictures = Pictures(self.directory, self.config, stop)
        keys = [parameter.key for parameter in self.sweep.space]
        auto = self.config.model.name == AUTO
        # The recipe of model=auto, if it is the same for all trials.
        self.decides_once = auto and not recipe.may_differ_by(self.config, keys)
        self.ledger = self.open_ledger(directory)
        self.waiting: list[Trial] = []  # begun, but not running now
        self.later: list[
            Trial
        ] = []  # trials that the machine failed in an earlier process: tried last
        # Trials not to batch with others: the process that tried them failed.
        self.alone: set[int] = set()
        self.jobs: list[TrialProcess] = []
        self.worker: Worker | None = None  # waits for something to do
        # --- failures of the machine ---
        self.tries: Counter[int] = Counter()  # that the machine has failed, by trial
        self.aside: dict[int, Fault] = {}  # trials that it failed at each try, by number
        self.doubts = 0  # about the machine, since the last completed trial
        self.own_faults = 0  # in a row, of this process
        self.resume_at = 0.0  # time.monotonic; no trial is started before

    def open_ledger(self, directory: Directory) -> Ledger:
        """Open the ledger, which chooses the trials (`make_ledger`)."""
        shared = self.config.sweep.storage
        if shared is None:
            return make_ledger(self.directory, self.sweep)
        what = sorted(filter(is_of_the_sweep, self.frozen["settings"]))
        what += sorted(f"{key}={text}" for key, text in self.frozen["ranges"].items())
        if self.pictures is not None:
            what.append(f"pictures {self.pictures.digest()[:12]}")
        with needed_by("sweep.storage", "sweep"):
            from trainer.sweep import optuna_ledger  # imported here: optional
        driver = optuna_ledger.Driver(
            directory.driver, " ".join(what), self.directory, self.config.sweep.lost_seconds
        )
        return optuna_ledger.Optuna(shared, self.sweep, self.directory.name, driver)

    def run(self) -> None:
        """Run the sweep to its end.

        Raises UserError where too few trials were done to call one the best, and Interrupted when
        asked to stop, or where the machine fails again and again.
        """
        try:
            self.patiently(self.settle_outcomes)
            trials = self.ledger.trials()
            running = [trial for trial in trials if trial.state == RUNNING]
            held = [trial for trial in running if self.ledger.holds(trial.number)]
            self.waiting = [trial for trial in held if not trial.reason]
            self.later = [trial for trial in held if trial.reason]
            keys = ", ".join(parameter.key for parameter in self.sweep.space)
            log.info("%d trials over %s", self.ledger.total, keys)
            done = len(trials) - len(running)
            if self.may_batch(self.config) and self.ledger.total > done + 1:
                self.worker = self.patiently(lambda: Worker(self.program(), slot=0))
            if trials:
                log.info("%d of them are done already; %d continue", done, len(held))
            with ProgressBar("trials", self.ledger.total, done) as bar:
                while self.patiently(self.step):
                    done = sum(trial.state != RUNNING for trial in self.ledger.trials())
                    bar.advance(done - bar.done)
            self.settle_aside()
            self.patiently(self.end)
        finally:
            process.end(self.jobs)
            self.dismiss()
            with suppress(MachineFault):  # others will wait for it, and then go on
                self.ledger.leave()

    def end(self) -> None:
        """Make the best trial a complete run, and show the results."""
        ranked = best_first(self.ledger.trials(), self.sweep)
        best = best_of(ranked, self.ledger.total)
        if best is not None:
            self.check_pictures()
            with files.locked(self.directory, self.stop.check, name=".lock-best"):
                self.finish(best)
        self.write_page()
        self.summarize(ranked, best)

    # --- driving it ---

    def patiently(self, work: Callable[[], T]) -> T:
        """Return what `work` returns; if the machine fails it, try again after a pause.

        Raise Interrupted after the last try: everything that runs is saved.
        """
        while True:
            try:
                return work()
            except (OSError, MachineFault) as error:
                line = one_line(error)
                if line is None or not is_machines(error):
                    raise
                if time.monotonic() - self.resume_at > 2 * PAUSES[-1]:
                    self.own_faults = 0
                if self.own_faults == len(PAUSES):
                    raise Interrupted(f"this machine, which failed each time ({line})") from error
                with suppress(OSError):  # its log may lie on the same disk
                    log.warning("%s; it is tried again in %g s", line, PAUSES[self.own_faults])
                self.pause(PAUSES[self.own_faults])
                self.own_faults += 1

    def pause(self, seconds: float) -> None:
        """Wait. Raise Interrupted when asked to stop."""
        self.resume_at = time.monotonic() + seconds
        while time.monotonic() < self.resume_at:
            self.stop.check()
            time.sleep(POLL)

    def step(self) -> bool:
        """Check the jobs once, and start others in place of those that ended.

        Return False where nothing is left to do. Raise Interrupted when asked to stop.
        """
        self.stop.check()
        self.ledger.beat()
        ended = 0
        for job in list(self.jobs):
            if self.is_taken_over(job) or self.look_after(job):
                self.jobs.remove(job)
                ended += 1
        if ended:
            self.write_page()
        pausing = time.monotonic() < self.resume_at
        for slot in sorted(set(range(self.sweep.parallel)) - {job.slot for job in self.jobs}):
            if pausing:
                break
            if trials := self.next_trials():
                output = self.place(trials[0]) / "output.txt"
                self.jobs.append(TrialProcess(trials, slot, output))
        others = self.others()
        if (self.jobs or pausing or others) and not ended:
            time.sleep(POLL)
        return bool(self.jobs or pausing or self.waiting or others)

    def others(self) -> bool:
        """Return whether drivers that share the ledger have trials that are not done."""
        return any(
            trial.state == RUNNING and not self.ledger.holds(trial.number)
            for trial in self.ledger.trials()
        )

    def check_pictures(self) -> None:
        """Raise UserError where the pictures are no longer those of the earlier trials."""
        if self.pictures is not None:
            self.pictures.check()

    def lacks(self) -> bool:
        """Return whether the pictures or weights have changed since the sweep began."""
        try:
            self.check_pictures()
        except UserError:
            return True
        return not all(Path(path).exists() for path in self.frozen.get("inputs", []))

    def next_trials(self) -> list[Trial]:
        """Return the next trial, and the following ones that can be batched with it."""
        trials: list[Trial] = []
        if self.jobs and self.decides_once and self.decided() is None:
            return trials  # the first one decides for all
        try:
            while taken := self.take():
                trial, batched = taken
                if trials and not batched:
                    self.waiting.insert(0, trial)
                    break
                trials.append(trial)
                if not batched or len(trials) == self.sweep.together:
                    break
        except Exception:
            self.waiting = trials + self.waiting
            raise
        return trials

    def take(self) -> tuple[Trial, bool] | None:
        """Return a trial to start, and whether it may share a process; None: there is none now.

        Its config.yaml is written to its directory.
        """
        while trial := self.next_trial():
            conf = self.directory / "source" / "conf"
            try:
                config = compose(self.overrides(trial), conf)
                self.prepare(trial, config)
            except (UserError, OSError, *CONFIG_ERRORS) as error:
                if is_machines(error) or not conf.exists():
                    self.waiting.insert(0, trial)
                    raise MachineFault(one_line(error, explain_settings)) from error
                self.tell(trial, FAILED, reason=one_line(error, explain_settings) or "")
                continue
            return trial, trial.number not in self.alone and self.may_batch(config)
        return None

    def may_batch(self, config: Config) -> bool:
        """Return whether a trial of these settings may share a process with others."""
        return self.sweep.together > 1 and head_only(config)

    def next_trial(self) -> Trial | None:
        """Return the next trial, whether it can start or not."""
        if self.waiting:
            return self.waiting.pop(0)
        trial = self.ledger.ask()
        if trial is None and self.later:
            trial = self.later.pop(0)
        return trial

    def prepare(self, trial: Trial, config: Config) -> None:
        """Make a trial's directory."""
        where = self.place(trial)
        noted = read_json(where / "trial.json")
        if noted not in (None, trial.params):
            log.warning(
                "trial %d: %s holds a trial of other values, which the ledger no longer "
                "lists: moved to %s",
                trial.number,
                where,
                self.set_aside(where),
            )
        where.mkdir(exist_ok=True)
        files.write(where / "trial.json", json.dumps(trial.params))
        text = OmegaConf.to_yaml(OmegaConf.create(dataclasses.asdict(config)))
        files.write(where / "config.yaml", text)
        self.hand_on(where)

    def set_aside(self, trial: Path) -> Path:
        """Move the directory of a trial that the ledger doesn't list, and return where it is."""
        aside = self.directory / ASIDE
        aside.mkdir(exist_ok=True)
        free = next(n for n in count(1) if not (aside / f"{trial.name}-{n}").exists())
        return trial.rename(aside / f"{trial.name}-{free}")

    def decided(self) -> Path | None:
        """Return the recipe of a trial, once it has decided it."""
        return next(iter(sorted(self.directory.glob(f"*/checkpoints/{recipe.FILE}"))), None)

    def hand_on(self, where: Path) -> None:
        """Give a trial the recipe that another one has decided for all."""
        written = where / "checkpoints" / recipe.FILE
        if not self.decides_once or written.exists():
            return
        first = self.decided()
        if first is not None:
            written.parent.mkdir(exist_ok=True)
            files.write(written, first.read_text())

    def is_taken_over(self, job: TrialProcess) -> bool:
        """Return whether another driver continues the job's trials; if so, end its process."""
        held = [trial for trial in job.trials if self.ledger.holds(trial.number)]
        if len(held) == len(job.trials):
            return False
        process.end([job])
        self.waiting = held + self.waiting
        return True

    def look_after(self, job: TrialProcess) -> bool:
        """Start the job's process when it can start, follow it, and note its outcome.

        Return whether it has ended.
        """
        if job.process is None:
            if any(in_use(self.place(trial)) for trial in job.trials):
                return False
            self.start(job)
        code = job.code()
        settled = self.outcomes_of(job).exists()
        if len(job.trials) == 1 and not settled:
            self.follow(job)
        if settled and (job.worker or code is not None):
            self.settle_outcomes()
            if job.worker:
                self.keep(job.worker)
            return True
        if code is None:
            return False
        if job.pruned:
            self.tell(job.trials[0], PRUNED)
        elif code == OK:
            result = read_result(self.place(job.trials[0])) or {}
            self.complete(job.trials[0], result.get("best_epoch"))
        else:
            self.failed(job, code)
        return True

    def start(self, job: TrialProcess, finishing: bool = False) -> None:
        """Start a trial, or several batched ones, by the sweep's own code.

        finishing: where a worker waits, it may do it. Raise UserError where the pictures are no
        longer those of the earlier trials.
        """
        self.check_pictures()
        for trial in job.trials:
            log.info("trial %d: %s", trial.number, " ".join(self.chosen(trial)))
        with naming(job.output):  # here, where an error is known as the machine's
            job.output.touch()
        if len(job.trials) > 1:
            self.outcomes_of(job).unlink(missing_ok=True)  # a damaged one
            numbers = [trial.number for trial in job.trials]
            worker = self.waiting_worker(job.slot) or Worker(self.program(), job.slot)
            job.share(worker, Request(sweep=str(self.directory.absolute()), trials=numbers))
            return
        words = self.overrides(job.trials[0])
        if finishing and (waiting := self.waiting_worker(job.slot)):
            job.share(waiting, Request(run=words))
            return
        self.dismiss()  # it may hold memory that the trial needs
        job.start(self.program(), ["trainer", *words])

    def program(self) -> Program:
        """Return what the processes run."""
        revision = self.frozen["revision"] or "unknown"
        return Program(self.directory / "source", revision, gpu=self.config.train.device != "cpu")

    def waiting_worker(self, slot: int) -> Worker | None:
        """Return the worker that waits, if there is one of this slot: it waits no more."""
        worker, self.worker = self.worker, None
        if worker is not None and (worker.slot != slot or worker.process.poll() is not None):
            worker.end()
            return None
        return worker

    def keep(self, worker: Worker) -> None:
        """Let a worker wait for more to do, in place of another one."""
        self.dismiss()
        self.worker = worker

    def dismiss(self) -> None:
        """End the worker that waits."""
        if self.worker is not None:
            self.worker.end()
            self.worker = None

    def overrides(self, trial: Trial) -> list[str]:
        """Return the command line of a trial's own process."""
        share = []
        if self.config.train.threads is None and self.sweep.parallel > 1:
            share = [f"train.threads={max(cores() // self.sweep.parallel, 1)}"]
        places = [
            f"name='{trial.number:04d}'",
            words.override("platform.runs", str(self.directory.absolute())),
            *(f"{key}=null" for key in OWN),
        ]
        replaced = {words.key_of(word) for word in places}
        fixed = [word for word in self.fixed if words.key_of(word) not in replaced]
        return [*fixed, *share, *self.chosen(trial), *places]

    def chosen(self, trial: Trial) -> list[str]:
        """Return the overrides of the trial's own values."""
        return [words.override(key, value) for key, value in trial.params.items()]

    def place(self, trial: Trial) -> Path:
        """Return the directory of the trial's run."""
        return self.directory / f"{trial.number:04d}"

    # --- outcomes ---

    def follow(self, job: TrialProcess) -> None:
        """Report the trial's new epochs to the ledger; end the trial if the ledger says so."""
        number = job.trials[0].number
        for row in evaluations(self.place(job.trials[0])):
            if row["epoch"] > job.epoch and not job.pruned:
                job.pruned = self.ledger.report(number, row["epoch"], row[self.sweep.objective])
                job.epoch = row["epoch"]
        if job.pruned and job.code() is None:
            process.end([job])

    def outcomes_of(self, job: TrialProcess) -> Path:
        """Return the file in which a process of batched trials writes their outcomes."""
        return self.directory / f"outcomes-{job.trials[0].number:04d}.json"

    def settle_outcomes(self) -> None:
        """Tell the ledger the outcomes of batched trials.

        They are on the disk all at once.
        """
        running = {
            trial.number: trial
            for trial in self.ledger.trials()
            if trial.state == RUNNING and self.ledger.holds(trial.number)
        }
        for path in sorted(self.directory.glob("outcomes-*.json")):
            # If it is damaged, its trials start again, and find their runs.
            for number, outcome in (read_json(path) or {}).items():
                if not number.isdecimal() or not isinstance(outcome, dict):
                    continue
                trial = running.pop(int(number), None)
                if trial is None:
                    continue
                if reason := outcome.get("failed"):
                    self.tell(trial, FAILED, reason=reason)
                else:
                    self.complete(trial, outcome.get("best_epoch"))

    def complete(self, trial: Trial, epoch: int | None) -> None:
        """Tell the ledger the objective at the trial's best epoch. One not finite is a failure.

        epoch: None where a damaged result.json doesn't tell it.
        """
        objective = self.sweep.objective
        rows = evaluations(self.place(trial))
        values = [row[objective] for row in rows if row["epoch"] == epoch]
        if not values:
            reason = f"{self.place(trial)}: result.json or metrics.jsonl is damaged"
            self.try_again([trial], Fault(Whose.MACHINE, reason))
            return
        value = values[-1]
        if math.isfinite(value):
            self.tell(trial, COMPLETE, value)
        else:
            reason = f"{objective} is {value} at its best epoch, {epoch}"
            self.tell(trial, FAILED, reason=reason)

    def tell(self, trial: Trial, state: str, value: float | None = None, reason: str = "") -> None:
        """Tell the ledger and the user a trial's outcome."""
        self.ledger.tell(trial.number, state, value, reason)
        if state in (COMPLETE, PRUNED):
            self.doubts = 0
        if value is not None:
            reason = f"{self.sweep.objective}={value:g}"
        log.info("trial %d %s%s", trial.number, state, f": {reason}" if reason else "")

    def failed(self, job: TrialProcess, code: int) -> None:
        """Record that a job's process failed; if the machine failed it, try again."""
        fault = job.fault()
        if code == MISTAKE and self.lacks():
            fault = Fault(Whose.MACHINE, fault.reason)
        if fault.whose is not Whose.MACHINE and len(job.trials) > 1:
            log.warning(
                "a batch of %d trials failed (%s); each is trained in a process of its own",
                len(job.trials),
                fault.reason,
            )
            self.alone |= {trial.number for trial in job.trials}
            self.waiting = job.trials + self.waiting
        elif fault.whose is Whose.TRIAL:
            self.tell(job.trials[0], FAILED, reason=fault.reason)
        else:
            self.try_again(job.trials, fault)

    def try_again(self, trials: list[Trial], fault: Fault) -> None:
        """Let a job's trials wait for another try; put them aside after their last one.

        Raise Interrupted if enough were put aside with none completed in between: the machine would
        fail the others too.
        """
        first = trials[0].number
        which = f"trial {first}"
        if len(trials) > 1:
            which = f"trials {first} to {trials[-1].number}"
        for trial in trials:
            self.ledger.note(trial.number, fault.reason)
        if self.tries[first] < len(PAUSES):
            pause = PAUSES[self.tries[first]]
            self.tries[first] += 1
            self.waiting = trials + self.waiting
            self.resume_at = time.monotonic() + pause
            log.warning("%s: %s; tried again in %g s", which, fault.reason, pause)
            return
        self.aside |= {trial.number: fault for trial in trials}
        self.doubts += DOUBTS[fault.whose]
        if self.doubts >= ENOUGH:
            raise Interrupted(f"this machine, which failed each of {self.failures()}")
        log.warning("%s: %s; the others continue", which, fault.reason)

    def settle_aside(self) -> None:
        """Settle the trials that failed at each try, as far as their outcome is final.

        Raise Interrupted if some aren't: the same command tries these again.
        """
        trials = {trial.number: trial for trial in self.ledger.trials()}
        if any(trial.state == COMPLETE for trial in trials.values()):
            for number, fault in list(self.aside.items()):
                if fault.whose is Whose.OPEN:
                    tries = len(PAUSES) + 1
                    reason = f"{fault.reason} (in each of {tries} tries, and others were completed)"
                    self.tell(trials[number], FAILED, reason=reason)
                    del self.aside[number]
        if self.aside:
            raise Interrupted(f"this machine, which failed each of {self.failures()}")

    def failures(self) -> str:
        """Return which trials the machine failed at each try, and why."""
        numbers = ", ".join(str(number) for number in sorted(self.aside))
        reasons = "; ".join(dict.fromkeys(fault.reason for fault in self.aside.values()))
        return f"{len(PAUSES) + 1} tries of trial {numbers} ({reasons})"

    # --- output ---

    def finish(self, trial: Trial) -> None:
        """Make the best trial a complete run, with its model package and report.

        It is one already, unless it was batched with others or has lost files. If it is on another
        machine, it is finished there.
        """
        where = self.place(trial)
        if trial.where:
            return
        if read_result(where) and (where / ARCHIVE).exists():
            return
        log.info(
            "trial %d is the best: it alone trains to the end, for its model package and report",
            trial.number,
        )
        where.mkdir(exist_ok=True)
        job = TrialProcess([trial], 0, where / "output.txt")
        self.jobs = [job]
        while job.code() is None:
            self.stop.check()
            self.ledger.beat()
            if job.process is None and not in_use(where):
                self.start(job, finishing=True)
            time.sleep(POLL)
        self.jobs = []
        if job.code() == OK:
            return
        fault = job.fault()
        if fault.whose is not Whose.TRIAL and self.tries[trial.number] < len(PAUSES):
            pause = PAUSES[self.tries[trial.number]]
            self.tries[trial.number] += 1
            log.warning("trial %d: %s; tried again in %g s", trial.number, fault.reason, pause)
            self.pause(pause)
            self.finish(trial)
        elif fault.whose is Whose.MACHINE:
            raise Interrupted(f"this machine, which failed the best trial ({fault.reason})")
        else:
            raise UserError(
                f"{where}: trial {trial.number} is the best, but can't be made a model package: "
                f"{fault.reason}"
            )

    def write_page(self) -> None:
        """Write sweep.html. One driver does it at a time."""
        trials = best_first(self.ledger.trials(), self.sweep)
        rows = {trial.number: evaluations(self.place(trial)) for trial in trials}
        facts = {
            "begun": self.frozen["began"],
            "git revision": self.frozen["revision"] or "unknown",
            "engine": self.sweep.engine,
        }
        best = best_of(trials, self.ledger.total)
        again = self.again(best) if best is not None else ""
        facts |= dict(self.words())
        shown = page.Page(self.directory.name, self.sweep, trials, best, rows, again, facts)
        with files.locked(self.directory, name=".lock-page") as mine:
            if mine:
                page.write(shown, self.directory / "sweep.html")

    def words(self) -> Iterator[tuple[str, str]]:
        """Yield the settings that all trials have, as (key, value)."""
        for word in self.fixed:
            yield words.key_of(word), word.split("=", 1)[-1]

    def again(self, trial: Trial) -> str:
        """Return the command that trains this trial once more, as a run of its own."""
        return command("trainer", *self.fixed, *self.chosen(trial))

    def summarize(self, ranked: list[Trial], best: Trial | None) -> None:
        """Show all trials, the best first, the best one's directory, and the next command.

        Raise UserError if none may be called the best.
        """
        keys = [parameter.key for parameter in self.sweep.space]
        table = [["trial", self.sweep.objective, *keys, ""]]
        for trial in ranked:
            objective = "" if trial.value is None else f"{trial.value:.6g}"
            note = ""
            if trial.state != COMPLETE:
                note = f"{trial.state}{': ' if trial.reason else ''}{trial.reason}"
            texts = {key: words.text(value) for key, value in trial.params.items()}
            params = [texts.get(key, "") for key in keys]
            table.append([str(trial.number), objective, *params, note])
        widths = [max(map(len, column)) for column in zip(*table, strict=True)]
        for *cells, note in table:
            aligned = map(str.rjust, cells, widths)
            log.info("  ".join(aligned) + f"  {note}".rstrip())
        if best is None:
            failed = next(trial for trial in ranked if trial.state == FAILED)
            done = sum(trial.state in (COMPLETE, PRUNED) for trial in ranked)
            raise UserError(
                f"{self.directory}: only {done} of {len(ranked)} trials were done, fewer than "
                "half, so none of them is called the best; "
                f"trial {failed.number} failed: {failed.reason}"
            )
        log.info("\n%-15s %s, trial %d", "best", best.where or self.place(best), best.number)
        tested = read_result(self.place(best))
        if tested and not best.where:
            log.info(
                "%-15s %s (%d pictures)",
                f"{tested['split']} accuracy",
                f"{tested['top1']:.1%}",
                tested["pictures"],
            )
            log.info("%-15s %s", "model package", self.place(best) / ARCHIVE)
        log.info("%-15s %s", "report", self.directory / "sweep.html")
        log.info("next:\n  %s", self.again(best))


def is_of_the_sweep(word: str) -> bool:
    """Return whether a setting must be the same on all machines of a sweep; paths may differ."""
    key = words.key_of(word)
    schema = settings.schema()
    is_path = key in schema and schema[key].metadata["path"]
    return not is_path and not key.startswith("platform")


def make_ledger(directory: Path, sweep: Sweep) -> Ledger:
    """Make the ledger. Raise UserError where it needs Optuna, and that isn't installed."""
    if sweep.engine == "grid":
        return Grid(directory / "trials.jsonl", sweep)
    with needed_by("sweep.engine=optuna", "sweep"):
        from trainer.sweep.optuna_ledger import Optuna  # imported here: optional
    return Optuna(directory / "optuna.journal", sweep)


def head_only(config: Config) -> bool:
    """Return whether such a trial trains only a head on cached features."""
    return (
        config.model.freeze == "backbone"
        and config.model.cached_views is not None
        and config.model.name != AUTO  # which a run of its own decides
        and not config.train.compile
    )


def evaluations(run: Path) -> list[dict[str, Any]]:
    """Return the rows of a run's epochs.

    These are the complete rows of metrics.jsonl that have valid's metrics.
    """
    path = run / "metrics.jsonl"
    rows = []
    if path.exists():
        rows = [parsed(line) or {} for line in path.read_bytes().split(b"\n")[:-1]]
    return [row for row in rows if {"epoch", "valid_loss"} <= row.keys()]


def read_json(path: Path) -> dict[str, Any] | None:
    """Return a file's JSON; None if it is missing or damaged."""
    if not path.exists():
        return None
    return parsed(path.read_bytes())
