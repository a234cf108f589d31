"""`python -m trainer -m ...`: the driver of a sweep.

It trains nothing itself: it starts trials as processes and notes what becomes of them.

A sweep lies in platform.runs/NAME: `sweep.json` (what was asked for), `source/` (the code and conf/
as they were then, which every trial uses), its ledger, `sweep.html`, and a directory for each
trial, which is an ordinary run. It can be killed at any moment and started again.
"""

import ctypes
import dataclasses
import hashlib
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from trainer.common import files
from trainer.common.console import ProgressBar, also_to_file, command, log
from trainer.common.cpu import cores
from trainer.common.errors import OK, RESUME, UserError, needed_by
from trainer.common.git import revision
from trainer.common.interrupt import Stop, on_signals, on_spot_notice
from trainer.images.datasets import find_images
from trainer.settings import config as settings
from trainer.settings import search_space as space
from trainer.settings import words
from trainer.settings.compose import CONF, check_options, compose, first_trial, resolve
from trainer.settings.config import Config
from trainer.settings.hydra_errors import CONFIG_ERRORS, explain
from trainer.settings.search_space import Sweep
from trainer.sweep import page
from trainer.sweep.ledger import COMPLETE, FAILED, PRUNED, RUNNING, Grid, Ledger, Trial, best_first
from trainer.sweep.pictures import Pictures, are_swept
from trainer.training import recipe
from trainer.training.run import read_result

PROJECT = Path(__file__).parents[2]
SOURCE = ("trainer", "serving", "conf")  # what a run is made by
FREE = ("sweep.trials", "sweep.parallel")  # may change when a sweep goes on
POLL = 0.05  # seconds between two looks at the trials
BATCH_LOCK = ".lock-batch"  # that a batch holds in the directory of each of its trials
PR_SET_PDEATHSIG = 1  # linux/prctl.h


def run(arguments: list[str]) -> None:
    """Run the sweep of a command line's overrides, from where it is to its end.

    Raises Interrupted when asked to stop.
    """
    fixed, swept = space.split(arguments)
    for word in filter(words.is_one_path, arguments):
        log.info("%s: one path, since it is there; several stand in quotes: 'a','b'", word)
    config, notes = base(CONF, fixed, swept)
    for line in notes:
        log.info(line)
    for line in settings.ignored(config, arguments, sweep=True):
        log.warning(line)
    notice = on_spot_notice if config.platform.name == "ec2" else lambda stop: nullcontext()
    with on_signals() as stop, opened(config, fixed, swept) as (directory, frozen), notice(stop):
        Driver(directory, fixed, frozen, stop).run()


def base(conf: Path, fixed: list[str], swept: dict[str, str]) -> tuple[Config, list[str]]:
    """Return the settings that a sweep begins with, and the notes on what was not said (`resolve`).

    Its lists stand at their first values.
    """
    resolved = resolve(first_trial(fixed, swept, conf), conf)
    return settings.load(resolved.composed), resolved.notes


# --- the directory of a sweep, and what is frozen in it ---


@contextmanager
def opened(
    config: Config, fixed: list[str], swept: dict[str, str]
) -> Iterator[tuple[Path, dict[str, Any]]]:
    """Give the sweep's directory, locked for this process, and what its sweep.json holds.

    Both are made, and the sweep is checked, if it is new. Raises UserError where another process
    runs it, or where it began with other settings.
    """
    asked: dict[str, Any] = {
        "settings": sorted(word for word in fixed if words.key_of(word) not in (*FREE, "name")),
        "ranges": swept,
    }
    directory = Path(config.platform.runs) / (config.name or sweep_name(config, asked))
    known = directory / "sweep.json"
    if not known.exists():
        check(config, fixed, swept)
    directory.mkdir(parents=True, exist_ok=True)
    with files.locked(directory) as mine, also_to_file(directory / "log.txt"):
        if not mine:
            raise UserError(
                f"{directory}: another process runs this sweep; wait for it, or give this one "
                "another name=..."
            )
        if not known.exists():
            freeze(directory, asked)
        frozen = json.loads(known.read_text())
        if changed := words_of(asked) ^ words_of(frozen):
            raise UserError(
                f"{directory}: this sweep began with other settings "
                f"({', '.join(sorted(changed))}); give the same, or another name=..."
            )
        log.info("sweep %s in %s", directory.name, directory)
        yield directory, frozen


def sweep_name(config: Config, asked: dict[str, Any]) -> str:
    """Return the name of a sweep that was given none.

    It is derived from the command line, not from what conf/ makes of it, so that the same command
    finds its own sweep after conf/ was edited.
    """
    text = json.dumps([asked, settings.places(config.data)], sort_keys=True)
    digest = hashlib.sha256(text.encode()).hexdigest()
    return f"sweep-{config.data.source}-{digest[:8]}"


def words_of(asked: dict[str, Any]) -> set[str]:
    """Return what was asked for as the words of a command line."""
    return {*asked["settings"], *(f"{key}={text}" for key, text in asked["ranges"].items())}


def check(config: Config, fixed: list[str], swept: dict[str, str]) -> None:
    """Raise UserError for what would fail every trial.

    Ranges that don't fit, options that don't exist, a folder without images.
    """
    sweep = space.load(config, swept, fixed)
    check_options(sweep, fixed, swept)
    if not are_swept(sweep):
        find_images(config, words=fixed)


def freeze(directory: Path, asked: dict[str, Any]) -> None:
    """Copy the code and conf/ as they are now.

    sweep.json, written last, says that they are complete.
    """
    files.sweep(directory)
    shutil.rmtree(directory / "source", ignore_errors=True)
    temporary = directory / f"{files.TEMPORARY}source"
    for name in SOURCE:
        ignored = shutil.ignore_patterns("__pycache__")
        shutil.copytree(PROJECT / name, temporary / name, ignore=ignored)
    temporary.rename(directory / "source")
    began = time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime())
    frozen = asked | {"revision": revision(), "began": began}
    files.write(directory / "sweep.json", json.dumps(frozen))


# --- driving it ---


@dataclass
class TrialProcess:
    """One process: a trial, or several heads that it trains one after the other."""

    trials: list[Trial]
    slot: int  # which of the processes that run at once; chooses the GPU
    # None: it waits for one that a killed driver left behind.
    process: subprocess.Popen[bytes] | None = None
    epoch: int = 0  # the last one reported
    pruned: bool = False


class Driver:
    """Starts a sweep's trials as processes, and notes what becomes of them."""

    def __init__(
        self, directory: Path, fixed: list[str], frozen: dict[str, Any], stop: Stop
    ) -> None:
        self.directory, self.frozen, self.stop = directory, frozen, stop
        # Neither the sweep's own settings nor the places that its trials would share are for the
        # trials.
        self.fixed = [
            word for word in fixed if words.key_of(word).split(".")[0] not in ("sweep", "name")
        ]
        self.config = base(directory / "source" / "conf", fixed, frozen["ranges"])[0]
        self.sweep = space.load(self.config, frozen["ranges"], fixed)
        self.ledger = make_ledger(directory, self.sweep)
        self.pictures: Pictures | None = None  # of all trials, where these don't choose others
        if not are_swept(self.sweep):
            self.pictures = Pictures(directory, self.config, stop)
        keys = [parameter.key for parameter in self.sweep.space]
        auto = self.config.model.name == settings.AUTO
        # What model=auto stands for, where it is the same for all trials.
        self.decides_once = auto and not recipe.may_differ_by(self.config, keys)
        self.waiting: list[Trial] = []  # begun, but not running now
        # Trials not to be batched with others: the process that tried it failed.
        self.alone: set[int] = set()
        self.jobs: list[TrialProcess] = []

    def run(self) -> None:
        """Run the sweep to its end.

        Raises UserError where no trial was completed, Interrupted when asked to stop.
        """
        total = self.sweep.trials
        if isinstance(self.ledger, Grid):
            total = len(self.ledger.points)
        self.settle_outcomes()
        self.waiting = [trial for trial in self.ledger.trials() if trial.state == RUNNING]
        done = len(self.ledger.trials()) - len(self.waiting)
        keys = ", ".join(parameter.key for parameter in self.sweep.space)
        log.info("%d trials over %s", total, keys)
        if self.ledger.trials():
            log.info("%d of them are done already; %d go on", done, len(self.waiting))
        with ProgressBar("trials", total, done) as bar:
            while self.step():
                done = sum(trial.state != RUNNING for trial in self.ledger.trials())
                bar.advance(done - bar.done)
        ranked = best_first(self.ledger.trials(), self.sweep)
        if ranked[0].state != COMPLETE:
            failed = next(trial for trial in ranked if trial.state == FAILED)
            raise UserError(
                f"{self.directory}: none of {len(ranked)} trials was completed; "
                f"trial {failed.number} failed: {failed.reason}"
            )
        self.check_pictures()
        self.finish_best(ranked[0])
        self.write_page()
        self.summarize(ranked)

    def step(self) -> bool:
        """Look after the jobs once, and start others in the place of those that ended.

        Return False where nothing is left to do.
        """
        if self.stop.reason:
            self.halt()
        ended = [job for job in self.jobs if self.look_after(job)]
        self.jobs = [job for job in self.jobs if job not in ended]
        if ended:
            self.write_page()
        for slot in sorted(set(range(self.sweep.parallel)) - {job.slot for job in self.jobs}):
            if trials := self.next_trials():
                self.check_pictures()
                self.jobs.append(TrialProcess(trials, slot))
        if self.jobs and not ended:
            time.sleep(POLL)
        return bool(self.jobs)

    def check_pictures(self) -> None:
        """Raise UserError where the pictures are no longer those of the trials before.

        What is running saves its state first.
        """
        if self.pictures is None:
            return
        try:
            self.pictures.check()
        except UserError:
            self.end_trials()
            raise

    def halt(self) -> None:
        """Have every trial save its state, and raise Interrupted."""
        self.end_trials()
        self.stop.check()

    def end_trials(self) -> None:
        """Have every trial save its state and end."""
        running = [job.process for job in self.jobs if job.process is not None]
        for process in running:
            process.terminate()
        for process in running:
            process.wait()

    def next_trials(self) -> list[Trial]:
        """Return the next trial, with those after it that can be batched with it."""
        trials: list[Trial] = []
        if self.jobs and self.decides_once and self.decided() is None:
            return trials  # the first one decides for all
        while taken := self.take():
            trial, batched = taken
            if trials and not batched:
                self.waiting.insert(0, trial)
                break
            trials.append(trial)
            if not batched or len(trials) == self.sweep.together:
                break
        return trials

    def take(self) -> tuple[Trial, bool] | None:
        """Return a trial to start, and whether it may share a process; None: no trial is left.

        Its config.yaml is written to its directory.
        """
        while trial := self.waiting.pop(0) if self.waiting else self.ledger.ask():
            try:
                config = compose(self.overrides(trial), self.directory / "source" / "conf")
            except (UserError, *CONFIG_ERRORS) as error:
                reason = str(error)
                if not isinstance(error, UserError):
                    reason = explain(error, settings.keys())
                self.tell(trial, FAILED, reason=reason)
                continue
            where = self.place(trial)
            where.mkdir(exist_ok=True)
            text = OmegaConf.to_yaml(OmegaConf.create(dataclasses.asdict(config)))
            files.write(where / "config.yaml", text)
            self.hand_on(where)
            may_batch = self.sweep.together > 1 and trial.number not in self.alone
            return trial, may_batch and head_only(config)
        return None

    def decided(self) -> Path | None:
        """Return the recipe of a trial that has decided what model=auto stands for."""
        return next(iter(sorted(self.directory.glob(f"*/checkpoints/{recipe.FILE}"))), None)

    def hand_on(self, where: Path) -> None:
        """Give a trial what another one has decided for all."""
        written = where / "checkpoints" / recipe.FILE
        if not self.decides_once or written.exists():
            return
        first = self.decided()
        if first is not None:
            written.parent.mkdir(exist_ok=True)
            files.write(written, first.read_text())

    def look_after(self, job: TrialProcess) -> bool:
        """Start the job's process when it can start, follow it, and note its outcome.

        Return whether it has ended.
        """
        if job.process is None:
            if any(in_use(self.place(trial)) for trial in job.trials):
                return False
            job.process = self.start(job)
        code = job.process.poll()
        if len(job.trials) == 1 and not self.outcomes_of(job).exists():
            self.follow(job)
        if code is None:
            return False
        if self.outcomes_of(job).exists():
            self.settle_outcomes()
        elif code == RESUME and not job.pruned:
            self.waiting = job.trials + self.waiting  # somebody stopped this process alone
        elif len(job.trials) > 1:
            log.warning(
                "a batch of %d trials failed (%s); each is trained in a process of its own",
                len(job.trials),
                self.reason(job, code),
            )
            self.alone |= {trial.number for trial in job.trials}
            self.waiting = job.trials + self.waiting
        elif job.pruned:
            self.tell(job.trials[0], PRUNED)
        elif code == OK:
            result = json.loads((self.place(job.trials[0]) / "result.json").read_text())
            self.complete(job.trials[0], result["best_epoch"])
        else:
            self.tell(job.trials[0], FAILED, reason=self.reason(job, code))
        return True

    def start(self, job: TrialProcess) -> subprocess.Popen[bytes]:
        """Start the process of a trial, or of several batched ones, by the sweep's own code."""
        first = job.trials[0]
        program = [sys.executable, "-P", "-m"]  # -P: not the code in the current directory
        if len(job.trials) > 1:
            numbers = [str(trial.number) for trial in job.trials]
            command = [*program, "trainer.sweep.batch", str(self.directory.absolute()), *numbers]
        else:
            command = [*program, "trainer", *self.overrides(first)]
        environment = {key: value for key, value in os.environ.items() if key != "HYDRA_FULL_ERROR"}
        search = [str((self.directory / "source").absolute())]
        if os.environ.get("PYTHONPATH"):
            search.append(os.environ["PYTHONPATH"])
        environment |= {
            "PYTHONPATH": os.pathsep.join(search),
            "PACKHORSE_REVISION": self.frozen["revision"] or "unknown",
        }
        if self.config.train.device != "cpu" and len(devices := gpus()) > 1:
            environment["CUDA_VISIBLE_DEVICES"] = devices[job.slot % len(devices)]
        for trial in job.trials:
            log.info("trial %d: %s", trial.number, " ".join(self.chosen(trial)))
        with (self.place(first) / "output.txt").open("ab") as output:
            return subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env=environment,
                start_new_session=True,  # Ctrl-C is for the driver, which then ends its trials
                preexec_fn=end_with_parent,
            )

    def overrides(self, trial: Trial) -> list[str]:
        """Return the command line of a trial's own process."""
        share = []
        if self.config.train.threads is None and self.sweep.parallel > 1:
            share = [f"train.threads={max(cores() // self.sweep.parallel, 1)}"]
        places = [
            f"name='{trial.number:04d}'",
            words.override("platform.runs", str(self.directory.absolute())),
            "platform.run_dir=null",
            "platform.checkpoints=null",
            "platform.package=null",
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
        """Report the epochs that the trial has ended since; end it where its ledger says so."""
        number = job.trials[0].number
        for row in evaluations(self.place(job.trials[0])):
            if row["epoch"] > job.epoch and not job.pruned:
                job.epoch = row["epoch"]
                job.pruned = self.ledger.report(number, job.epoch, row[self.sweep.objective])
        if job.pruned and job.process is not None and job.process.poll() is None:
            job.process.terminate()
            job.process.wait()

    def outcomes_of(self, job: TrialProcess) -> Path:
        """Return where a process of batched trials writes what became of them."""
        return self.directory / f"outcomes-{job.trials[0].number:04d}.json"

    def settle_outcomes(self) -> None:
        """Tell the ledger what came of batched trials.

        A batch's outcomes are on the disk all at once.
        """
        running = {trial.number: trial for trial in self.ledger.trials() if trial.state == RUNNING}
        for path in sorted(self.directory.glob("outcomes-*.json")):
            for number, outcome in json.loads(path.read_text()).items():
                trial = running.pop(int(number), None)
                if trial is None:
                    continue
                if reason := outcome.get("failed"):
                    self.tell(trial, FAILED, reason=reason)
                else:
                    self.complete(trial, outcome["best_epoch"])

    def complete(self, trial: Trial, epoch: int) -> None:
        """Tell the ledger the objective at the trial's best epoch. One not finite is a failure."""
        objective = self.sweep.objective
        rows = evaluations(self.place(trial))
        value = next(row[objective] for row in rows if row["epoch"] == epoch)
        if math.isfinite(value):
            self.tell(trial, COMPLETE, value)
        else:
            reason = f"{objective} is {value} at its best epoch, {epoch}"
            self.tell(trial, FAILED, reason=reason)

    def tell(self, trial: Trial, state: str, value: float | None = None, reason: str = "") -> None:
        """Tell the ledger and the user a trial's outcome."""
        self.ledger.tell(trial.number, state, value, reason)
        if value is not None:
            reason = f"{self.sweep.objective}={value:g}"
        log.info("trial %d %s%s", trial.number, state, f": {reason}" if reason else "")

    def reason(self, job: TrialProcess, code: int) -> str:
        """Return why a process failed, in one line: its last word."""
        if code == -signal.SIGKILL:
            return "killed by SIGKILL: was the memory full?"
        if code < 0:
            return f"killed by {signal.Signals(-code).name}"
        lines = (self.place(job.trials[0]) / "output.txt").read_text(errors="replace").split("\n")
        said = [line.removeprefix("error: ") for line in lines if line.strip()]
        return said[-1] if said else f"exit code {code}"

    # --- what is shown ---

    def finish_best(self, trial: Trial) -> None:
        """Make the best trial a whole run, with its model package and report.

        It is one already unless it was batched with others.
        """
        if read_result(self.place(trial)):
            return
        log.info(
            "trial %d is the best: it is trained once more, alone, for its model package "
            "and report",
            trial.number,
        )
        job = TrialProcess([trial], 0)
        self.jobs = [job]
        while job.process is None or job.process.poll() is None:
            if self.stop.reason:
                self.halt()
            if job.process is None and not in_use(self.place(trial)):
                job.process = self.start(job)
            time.sleep(POLL)
        if job.process.returncode == RESUME:
            self.stop.ask("the best trial, which was stopped")
            self.stop.check()
        if job.process.returncode != OK:
            log.warning(
                "trial %d could not be trained once more: %s",
                trial.number,
                self.reason(job, job.process.returncode),
            )

    def write_page(self) -> None:
        """Write sweep.html."""
        trials = best_first(self.ledger.trials(), self.sweep)
        rows = {trial.number: evaluations(self.place(trial)) for trial in trials}
        facts = {
            "begun": self.frozen["began"],
            "git revision": self.frozen["revision"] or "unknown",
            "engine": self.sweep.engine,
        }
        again = self.again(trials[0])
        facts |= dict(self.words())
        shown = page.Page(self.directory.name, self.sweep, trials, rows, again, facts)
        page.write(shown, self.directory / "sweep.html")

    def words(self) -> Iterator[tuple[str, str]]:
        """Yield the settings that all trials have, as (key, value)."""
        for word in self.fixed:
            yield words.key_of(word), word.split("=", 1)[-1]

    def again(self, trial: Trial) -> str:
        """Return the command that trains this trial once more, as a run of its own."""
        return command("trainer", *self.fixed, *self.chosen(trial))

    def summarize(self, ranked: list[Trial]) -> None:
        """Show all trials, the best first; where the best lies; and what to do next."""
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
        where = self.place(ranked[0])
        log.info("\n%-15s %s, trial %d", "best", where, ranked[0].number)
        tested = read_result(where)
        if tested:
            log.info(
                "%-15s %.1f %% (%d pictures)",
                f"{tested['split']} accuracy",
                100 * tested["top1"],
                tested["pictures"],
            )
            log.info("%-15s %s", "model package", where / "model.tar.gz")
        log.info("%-15s %s", "report", self.directory / "sweep.html")
        log.info("next:\n  %s", self.again(ranked[0]))


def make_ledger(directory: Path, sweep: Sweep) -> Ledger:
    """Make what chooses the trials. Raises UserError where Optuna is wanted and not installed."""
    if sweep.engine == "grid":
        return Grid(directory / "trials.jsonl", sweep)
    with needed_by("sweep.engine=optuna", "sweep"):
        from trainer.sweep.optuna_ledger import Optuna  # imported here: optional
    return Optuna(directory / "optuna.journal", sweep)


def head_only(config: Config) -> bool:
    """Return whether all that such a trial trains is a head on cached features."""
    return (
        config.model.name != settings.AUTO
        and config.model.freeze == "backbone"
        and config.model.cached_views is not None
        and not config.train.compile
    )


def evaluations(run: Path) -> list[dict[str, Any]]:
    """Return the rows of a run's epochs.

    Those of metrics.jsonl that are complete and hold valid's metrics.
    """
    path = run / "metrics.jsonl"
    lines = path.read_text().split("\n")[:-1] if path.exists() else []
    return [row for row in map(json.loads, lines) if "valid_loss" in row]


def in_use(run: Path) -> bool:
    """Return whether a process trains this trial, or is about to."""
    with files.locked(run) as free, files.locked(run, name=BATCH_LOCK) as unclaimed:
        return not (free and unclaimed)


def gpus() -> list[str]:
    """Return the GPUs that this process may use, as CUDA_VISIBLE_DEVICES names them."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return [name for name in visible.split(",") if name]
    driver = Path("/proc/driver/nvidia/gpus")
    return [str(number) for number, _ in enumerate(driver.iterdir())] if driver.is_dir() else []


# Loaded here: between fork and exec is no place for it.
_libc = ctypes.CDLL(None) if sys.platform == "linux" else None


def end_with_parent() -> None:
    """Have Linux send this process SIGTERM when the driver dies.

    So it saves, and the machine is free. Elsewhere it trains on to its end.
    """
    if _libc is not None:
        _libc.prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
