"""Real runs, ended in every way and damaged in between, against one that was never disturbed.

`make soak` (KILLS=200 SEED=0) runs python -m tests.soak --kills 200 --seed 0. The seed decides
where and how each life ends and what is damaged then, as far as the machine's pace allows.

A run has many lives: each start is one. A life ends by itself, is killed (the process, its group,
one child), loses its terminal or its pipe, or finds the disk full, at a stage that is seen from
outside. Between two lives one file of the run or of the cache may be damaged, and the number of
workers and processes changes. In the end all that came out is compared byte for byte. A life may
also refuse: in one line, which names the damaged file; then it is brought back as that line says,
and the run must go on. Nothing else passes.
"""

import argparse
import json
import os
import random
import re
import select
import shutil
import signal
import subprocess
import sys
import tarfile
import tempfile
import threading
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import torch as safetensors

from tests.conftest import Process, environment, make_pictures, share_exports
from tests.forked import Forked
from tests.ports import free_port
from tests.trainer.distributed.together import rank_environment
from tests.trainer.trainings import TIMES
from trainer.common import files
from trainer.common.errors import MISTAKE, OK, RESUME
from trainer.common.model_package import MANIFEST
from trainer.training import checkpoint

EPOCHS = 8
# Everything that has state is on, and saving happens all the time, so that many ends fall into it.
SETTINGS = (
    "name=run", "platform=local", "platform.cache=cache", "data=folder", "model=small_cnn",
    "data.root=pictures", "data.size=16", "data.resize=18", "data.augment.trivial=true",
    f"train.epochs={EPOCHS}", "train.batch_size=8", "train.accumulate=2",
    "train.ema_decay=0.9", "train.clip_norm=1", "train.threads=1", "optim.head_lr=3e-3",
    "checkpoint.minutes=1e-4", "checkpoint.max_cost=1",
)  # fmt: skip
STEPS_PER_EPOCH = 6  # 48 pictures in batches of 8
STEPS = EPOCHS * STEPS_PER_EPOCH
RUN = Path("runs/run")


@dataclass(frozen=True)
class Variant:
    """What is trained.

    processes: how many may take part; another number each time. without: stages that it has not.
    share: how often it is chosen.
    """

    settings: tuple[str, ...]
    processes: tuple[int, ...] = (1,)
    without: tuple[str, ...] = ("features", "recipe")
    share: float = 1.0


VARIANTS = {
    "whole network": Variant((*SETTINGS, "data.augment.mixup=0.4", "data.augment.cutmix=1.0")),
    "frozen backbone": Variant(
        (
            *SETTINGS,
            "model.freeze=backbone",
            "model.cached_views=2",
            "model.head_hidden=8",
        ),
        without=("recipe",),
    ),
    "exact": Variant(
        (
            *SETTINGS,
            "train.accumulate=1",
            "train.exact_shards=2",
            "train.timeout_seconds=30",
        ),
        (1, 2),
    ),
    "recipe": Variant(
        (
            "name=run", "platform=local", "platform.cache=cache", "data.root=pictures",
            "model=auto", "model.weights_dir=weights", "train.batch_size=8", "train.threads=1",
            "recipe.minutes=null", "recipe.tune_minutes=0",
        ),
        without=("epoch", "evaluation"),  # its head is solved, and nothing trained
        share=0.2,  # it computes three times as much as another, and has as many ends
    ),
}  # fmt: skip
QUICK = ("whole network", "frozen backbone")  # of `make test`
CANDIDATES = ("shufflenet_v2_x0_5", "squeezenet1_1")  # of the recipe
LEAP = STEPS // 4  # that one life makes at most, so that a run has several
HANG = 600.0  # seconds after which a life counts as hanging
ALONE = 60.0  # seconds after which a launcher ends what remains of a job, one of which has ended

GROUP, MAIN, CHILD = (
    "kill -9 of the process group",
    "kill -9 of the main process",
    "kill -9 of a child",
)
TERMINAL, PIPE, DISK = "the terminal goes", "the pipe goes", "the disk is full"
SIGNALS = ("SIGTERM", "SIGINT", "SIGHUP")
TO_GROUP = tuple(f"{name} to the group" for name in SIGNALS)
KILLS = (GROUP, MAIN, CHILD, *SIGNALS, *TO_GROUP, TERMINAL, PIPE, DISK)

# What is seen of a life when it has come to a stage, in the order in which they come.
STAGES = (
    "start",
    "scan",
    "recipe",
    "packing",
    "features",
    "epoch",
    "checkpoint",
    "evaluation",
    "test",
    "export",
    "report",
)
# Most of the time of a run is training.
WEIGHTS = dict.fromkeys(STAGES, 1) | {"epoch": 6, "checkpoint": 2}


@dataclass
class Tally:
    """What a soak saw. `failures` is empty when it passed."""

    kills: Counter[str] = field(default_factory=Counter)  # how lives ended
    stages: Counter[str] = field(default_factory=Counter)  # where
    harms: Counter[str] = field(default_factory=Counter)  # what was damaged in between, and how
    verdicts: Counter[str] = field(default_factory=Counter)
    runs: int = 0
    failures: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        lines = [
            f"{sum(self.kills.values())} lives ended in {self.runs} runs, "
            f"{len(self.failures)} failures"
        ]
        for name in ("kills", "stages", "harms", "verdicts"):
            lines += [f"{name}:"]
            lines += [f"  {count:4d} {what}" for what, count in getattr(self, name).most_common()]
        return "\n".join(lines + [f"  FAILED {failure}" for failure in self.failures])


# --- what came out ---


def outcome(run: Path) -> dict[str, object]:
    """Return what a run has made of itself: of its last checkpoint, and of its package."""
    newest = checkpoint.newest(run / "checkpoints")
    assert newest is not None
    _, state = newest
    progress = state["progress"]
    rows = [
        {key: value for key, value in row.items() if key not in TIMES} for row in progress["rows"]
    ]
    kept = {key: progress[key] for key in ("epoch", "batch", "step", "best")}
    tensors = {name: state[name] for name in ("network", "average", "optimizer", "scaler")}
    return tensors | {
        "best": state["best"], "package": packaged(run), "rows": rows, "progress": kept,
    }  # fmt: skip


def packaged(run: Path) -> dict[str, torch.Tensor] | None:
    """The weights in a run's model package, if it has one."""
    if not (run / "model.tar.gz").exists():
        return None
    with tarfile.open(run / "model.tar.gz") as archive:
        weights = archive.extractfile("model.safetensors")
        assert weights is not None
        return safetensors.load(weights.read())


def contents(run: Path) -> dict[str, object] | None:
    """All files of a run's model package, if it has one; of the manifest what no clock decides."""
    if not (run / "model.tar.gz").exists():
        return None
    with tarfile.open(run / "model.tar.gz") as archive:
        found: dict[str, object] = {
            member.name: archive.extractfile(member).read()  # type: ignore[union-attr]
            for member in archive
            if member.isfile()
        }
    manifest = json.loads(found[MANIFEST])  # type: ignore[arg-type]
    found[MANIFEST] = {
        key: value for key, value in manifest.items() if key not in ("created", "sha256")
    }
    found["weights"] = packaged(run)
    return found


def told(run: Path) -> dict[str, object]:
    """What a complete run has told: the rows and the result, without times."""
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    result = json.loads((run / "result.json").read_text())
    return {
        "metrics.jsonl": [
            {key: value for key, value in row.items() if key not in TIMES} for row in rows
        ],
        "result.json": {
            key: value
            for key, value in result.items()
            if key not in ("seconds", "stages", "files", "sha256")
        },
        "report.html": "</html>" in (run / "report.html").read_text(),
    }


def difference(one: object, other: object, name: str = "") -> str | None:
    """Where two outcomes differ first, or None. Tensors are compared bit for bit."""
    if isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor):
        return None if one.dtype == other.dtype and torch.equal(one, other) else name
    if isinstance(one, dict) and isinstance(other, dict):
        if one.keys() != other.keys():
            return f"{name}: {sorted(one.keys() ^ other.keys())}"
        return _first(difference(one[key], other[key], f"{name}/{key}") for key in one)
    if isinstance(one, list | tuple) and isinstance(other, list | tuple):
        if len(one) != len(other):
            return f"{name}: {len(one)} and {len(other)} entries"
        pairs = enumerate(zip(one, other, strict=True))
        return _first(difference(*pair, f"{name}/{key}") for key, pair in pairs)
    return None if one == other else f"{name}: {one} and {other}"


def _first(differences: Iterable[str | None]) -> str | None:
    return next(filter(None, differences), None)


def leftovers(directory: Path) -> list[str]:
    """Temporary files of killed writers."""
    return [
        str(path.relative_to(directory)) for path in directory.rglob(".*") if path.name != ".lock"
    ]


def compare(expected: object, directory: Path) -> list[str]:
    """Return what is wrong with a complete run: nothing, if it equals the undisturbed one.

    expected: of `everything`.
    """
    faults = []
    try:
        if where := difference(expected, everything(directory / RUN)):
            faults.append(f"differs from the undisturbed run in {where}")
    except (OSError, EOFError, ValueError, KeyError, tarfile.TarError) as error:
        faults.append(f"differs from the undisturbed run: {type(error).__name__}: {error}")
    if left := leftovers(directory / "runs"):
        faults.append(f"left behind {left}")
    return faults


def everything(run: Path) -> dict[str, object]:
    """All that a complete run has made."""
    return outcome(run) | {"package": contents(run), "told": told(run)}


# --- a life ---


class Life:
    """One start of a run: its processes, and what they print."""

    forked = False  # started as a user does

    def __init__(
        self, directory: Path, variant: Variant, rng: random.Random, terminal: bool = False
    ) -> None:
        """rng: chooses the numbers of workers and processes. terminal: whether it has one."""
        self.directory, self.run = directory, directory / RUN
        size = rng.choice(variant.processes)
        words = ["trainer", *variant.settings, f"data.workers={rng.choice((0, 1, 2, 3))}"]
        share_exports(directory, words)
        self._mine, theirs = os.openpty() if terminal else os.pipe()
        variables = [environment(directory)]
        if size > 1:
            port = free_port()
            variables = [rank_environment(directory, rank, size, port) for rank in range(size)]
        self.processes = [self._start(words, each, theirs) for each in variables]
        os.close(theirs)
        self.lines: list[str] = []
        self._gone = threading.Event()
        self._reader = threading.Thread(target=self._read)
        self._reader.start()

    def _start(self, words: Sequence[str], variables: Mapping[str, str], output: int) -> Process:
        if self.forked:
            return Forked(self.directory, words, variables, output=output)
        return subprocess.Popen(
            [sys.executable, "-m", *words],
            cwd=self.directory,
            env=variables,
            stdout=output,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )

    def _read(self) -> None:
        rest = b""
        while not self._gone.is_set():
            if not select.select([self._mine], [], [], 0.05)[0]:
                continue
            try:
                data = os.read(self._mine, 65536)
            except OSError:  # nobody has the other end of a terminal any more
                break
            if not data:
                break
            *lines, rest = (rest + data).split(b"\n")
            self.lines += [line.decode(errors="replace") for line in lines]
        os.close(self._mine)
        self.lines.append(rest.decode(errors="replace"))

    def close(self) -> None:
        """Let its terminal or pipe go, as a window or `| head` does."""
        self._gone.set()
        self._reader.join()

    def ended(self) -> bool:
        return all(process.poll() is not None for process in self.processes)

    def end(self) -> int | None:
        """Wait for its end; return the exit code (of rank 0), or None where it hung."""
        deadline, hung = time.monotonic() + HANG, False
        self._end_what_is_alone(deadline)
        for process in self.processes:
            try:
                process.wait(max(deadline - time.monotonic(), 1))
            except subprocess.TimeoutExpired:
                hung = True
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        self._reader.join(10)  # what outlives it may hold the pipe
        self.close()
        return None if hung else self.processes[0].returncode

    def _end_what_is_alone(self, deadline: float) -> None:
        """Do what every launcher does: ask the other processes to stop when one has ended.

        torchrun does it at once, and SIGKILL follows; here they have a while to see it themselves.
        """
        since: float | None = None
        while not self.ended() and time.monotonic() < deadline:
            if since is None and any(process.poll() is not None for process in self.processes):
                since = time.monotonic()
            if since is not None and time.monotonic() > since + ALONE:
                for process in self.processes:
                    process.send_signal(signal.SIGTERM)
                return
            time.sleep(0.02)

    # --- its stages ---

    def at(self, stage: str, after: int) -> bool:
        """Return whether it has come to a stage.

        after: the step that a checkpoint must have, of stages of an epoch.
        """
        checkpoints = self.run / "checkpoints"
        if stage == "start":
            return True
        if stage in FIRST_LINES:
            return any(line.startswith(FIRST_LINES[stage]) for line in self.lines)
        if stage == "features":
            return any((self.directory / "cache/features").glob("*/*"))
        if stage == "epoch":
            return newest_step(checkpoints) >= after
        if stage == "checkpoint":
            return newest_step(checkpoints) >= after and any(
                checkpoints.glob(f"{files.TEMPORARY}*")
            )
        if stage == "evaluation":
            step = newest_step(checkpoints)
            evaluated = (checkpoints / checkpoint.step_name(step, True)).exists()
            return step >= after and step % STEPS_PER_EPOCH == 0 and not evaluated
        if stage == "test":
            return any("test_loss" in line for line in self.lines)
        if stage == "export":
            return any(self.run.glob(f"{files.TEMPORARY}*/package"))
        assert stage == "report", stage
        return (self.run / "model.tar.gz").exists()

    def wait_for(self, stage: str, after: int) -> bool:
        """Wait until it comes to a stage; return whether it did before its end."""
        deadline = time.monotonic() + HANG
        while not self.ended() and time.monotonic() < deadline:
            if self.at(stage, after):
                return True
            time.sleep(0.002)
        return False


# The lines after which a stage begins.
FIRST_LINES = {"scan": "run ", "recipe": "pictures:", "packing": "model:"}


def newest_step(checkpoints: Path) -> int:
    steps = checkpoint.steps(checkpoints)
    return int(steps[-1].name.split("-")[1]) if steps else 0


def children(process: int) -> list[int]:
    """The processes that it has started."""
    found: list[int] = []
    for path in Path(f"/proc/{process}/task").glob("*/children"):
        with suppress(OSError):
            found += map(int, path.read_text().split())
    return found


def strike(life: Life, how: str, rng: random.Random) -> bool:
    """End a life, or take from it what it needs. Return whether that was possible."""
    process = rng.choice(life.processes)
    with suppress(ProcessLookupError):
        if how in (TERMINAL, PIPE):
            life.close()
        if how == CHILD:
            return kill_child(life, process, rng)
        if how == GROUP or how in TO_GROUP:
            for each in life.processes:
                os.killpg(each.pid, number_of(how))
        elif how != PIPE:
            process.send_signal(number_of(how))
    return True


def number_of(how: str) -> signal.Signals:
    """The signal that such an end sends."""
    name = how.split(" ")[0]
    if name in SIGNALS:
        return signal.Signals[name]
    return signal.SIGHUP if how == TERMINAL else signal.SIGKILL


def kill_child(life: Life, process: Process, rng: random.Random) -> bool:
    """Wait for a child of a process, and kill it; return whether it had one."""
    deadline = time.monotonic() + 10
    while not life.ended() and time.monotonic() < deadline:
        if found := children(process.pid):
            os.kill(rng.choice(found), signal.SIGKILL)
            return True
        time.sleep(0.002)
    return False


@contextmanager
def full_disk(directory: Path) -> Iterator[None]:
    """Leave no byte free on the disk of a directory while the context lasts."""
    filler = directory / "filler"
    with filler.open("wb", buffering=0) as file, suppress(OSError):
        while True:
            file.write(bytes(1 << 16))
    with filler.open("ab", buffering=0) as file, suppress(OSError):
        while True:
            file.write(bytes(512))
    try:
        yield
    finally:
        filler.unlink()


def allowed(how: str) -> set[int]:
    """The exit codes of a life that ended so; each may also have ended before."""
    if how in (GROUP, MAIN):  # of rank 0; the others may be lost
        return {OK, RESUME, -signal.SIGKILL}
    if how in (*SIGNALS, *TO_GROUP, TERMINAL):  # until it has something to save, it just ends
        return {OK, RESUME, -number_of(how)}
    if how == CHILD:  # its work can be done once more
        return {OK, RESUME}
    if how == PIPE:
        return {OK}
    assert how == DISK, how
    return {OK, RESUME, MISTAKE}


# --- damage ---


@dataclass
class Harm:
    """A damaged file, and how it was."""

    path: Path
    how: str
    before: bytes

    def mend(self) -> None:
        """Bring it back, as a person does who has a copy."""
        files.remove(self.path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.path.write_bytes(self.before)


def flip(path: Path, rng: random.Random, other: Path) -> None:
    data = bytearray(path.read_bytes())
    place = rng.randrange(len(data) or 1)
    data[place : place + 1] = bytes(
        each ^ 1 << rng.randrange(8) for each in data[place : place + 1]
    )
    path.write_bytes(data)


def truncate(path: Path, rng: random.Random, other: Path) -> None:
    data = path.read_bytes()
    path.write_bytes(data[: rng.randrange(len(data) or 1)])


def delete(path: Path, rng: random.Random, other: Path) -> None:
    path.unlink()


def zero(path: Path, rng: random.Random, other: Path) -> None:
    path.write_bytes(bytes(path.stat().st_size))


def unreadable(path: Path, rng: random.Random, other: Path) -> None:
    """To read what stands there gives EIO, for root too."""
    path.unlink()
    path.symlink_to("/proc/self/mem")


def replace(path: Path, rng: random.Random, other: Path) -> None:
    path.write_bytes(other.read_bytes())


HARMS: tuple[Callable[[Path, random.Random, Path], None], ...] = (
    flip, truncate, delete, zero, unreadable, replace,
)  # fmt: skip
LOCKS = re.compile(r"^\.lock")  # empty files, of which the name alone counts


def harm(directory: Path, rng: random.Random, only: Sequence[str] = ()) -> Harm | None:
    """Damage one file of the run or of the cache. only: of which names. None: there is none."""
    found = [
        Path(root, name)
        for part in ("runs", "cache")
        for root, _, names in os.walk(directory / part)
        for name in sorted(names)
        if not LOCKS.match(name) and not Path(root, name).is_symlink()
    ]
    chosen = [path for path in found if not only or path.name in only]
    if not chosen:
        return None
    # A place first, so that many small files in one do not hide the others.
    place = rng.choice(sorted({path.parent for path in chosen}))
    path = rng.choice([path for path in sorted(chosen) if path.parent == place])
    how, before = rng.choice(HARMS), path.read_bytes()
    how(path, rng, rng.choice(sorted(found)))
    return Harm(path, how.__name__, before)


def kind(path: Path, directory: Path) -> str:
    """What a file is, without numbers and digests."""
    name = re.sub(r"[0-9a-f]{8,}", "*", str(path.relative_to(directory)))
    return re.sub(r"\d+", "#", name)


def refusal(lines: Sequence[str], harmed: Harm | None) -> str | None:
    """Return what is wrong with what a life said as it refused; None: one line, with the file."""
    errors = [line for line in lines if line.startswith("error: ")]
    if any("Traceback" in line for line in lines):
        return "a traceback"
    if len(errors) != 1:
        return f"{len(errors)} lines of error"
    if harmed is None:
        return "no file was damaged"
    step = harmed.path.parent.name  # of a checkpoint, which is named as a whole
    named = harmed.path.name in errors[0] or (step.startswith("step-") and step in errors[0])
    if not named:
        return f"the line does not name {harmed.path}"
    return None


# --- many lives of many runs ---


class Soak:
    """Runs that live and die until there were enough ends, or one failed."""

    def __init__(
        self,
        root: Path,
        kills: int,
        seed: int,
        variants: Sequence[str],
        complete: bool,
        note: Path | None = None,
    ) -> None:
        """complete: whether complete runs are damaged too. note: where the tally is written."""
        self.root, self.wanted, self.seed, self.variants = root, kills, seed, variants
        self.complete, self.note = complete, note
        self.tally, self.lock = Tally(), threading.Lock()
        self.expected: dict[str, object] = {}
        self.mounts = True  # whether a small disk can be had

    def done(self) -> bool:
        return sum(self.tally.kills.values()) >= self.wanted or bool(self.tally.failures)

    def say(self, line: str) -> None:
        print(line, flush=True)

    def fail(self, where: str, what: str, lines: Sequence[str] = ()) -> None:
        tail = "\n".join(lines)[-3000:]
        self.tally.failures.append(f"{where}: {what}\n{tail}")

    @contextmanager
    def place(self, name: str) -> Iterator[Path]:
        """Give a directory with the pictures, on a small disk of its own where that can be had."""
        directory = self.root / name
        directory.mkdir()
        mounted = self.mounts and mount(directory)
        self.mounts = mounted
        for fixture in ("pictures", "weights"):
            (directory / fixture).symlink_to(self.root / fixture)
        try:
            yield directory
        finally:
            if mounted:
                subprocess.run(["umount", "-l", str(directory)], check=True)
            shutil.rmtree(directory, ignore_errors=True)

    def lane(self, number: int) -> None:
        """Live runs of the variants, one after the other."""
        try:
            self.live(random.Random(f"{self.seed}/{number}"), self.variants[number % 2 :: 2])
        except BaseException as error:  # what stops the soak itself is no success
            self.fail(f"lane {number}", "".join(traceback.format_exception(error)))
            raise

    def live(self, rng: random.Random, variants: Sequence[str]) -> None:
        while not self.done():
            variant = rng.choices(variants, [VARIANTS[each].share for each in variants])[0]
            if variant not in self.expected and not self.undisturbed(variant, rng):
                return
            with self.lock:
                self.tally.runs += 1
                name = f"{self.tally.runs}-{variant.replace(' ', '-')}"
            with self.place(name) as directory:
                self.disturbed(directory, variant, rng)
            if self.note is not None:
                with self.lock:
                    self.note.write_text(f"{self.tally}\n")

    def undisturbed(self, variant: str, rng: random.Random) -> bool:
        """Note what comes of a run that nothing disturbs; return whether it ended well."""
        with self.place(f"undisturbed-{variant.replace(' ', '-')}") as directory:
            life = Life(directory, VARIANTS[variant], rng)
            if (code := life.end()) != OK:
                self.fail(f"the undisturbed {variant}", f"exit code {code}", life.lines)
                return False
            self.expected[variant] = everything(directory / RUN)
            self.say(f"undisturbed: {variant}")
            return True

    def disturbed(self, directory: Path, variant: str, rng: random.Random) -> None:
        """Live one run to its end, and compare what came of it."""
        where, harmed = directory.name, None
        for number in range(rng.randint(3, 12)):
            if self.tally.failures:
                return
            code, harmed = self.one_life(f"{where}, life {number}", directory, variant, rng, harmed)
            if code is None or (code == OK and harmed is None):
                break
            if harmed is None and rng.random() < 0.5:
                harmed = self.harmed(directory, rng)
        if self.tally.failures:
            return
        self.to_the_end(where, directory, variant, rng, harmed)
        if not self.tally.failures:
            self.judge(where, directory, variant)
        if self.complete and not self.tally.failures and rng.random() < 0.4:
            # What a complete run holds is made again, or its loss is told.
            harmed = self.harmed(directory, rng, COMPLETE)
            self.to_the_end(f"{where}, complete", directory, variant, rng, harmed)
            if not self.tally.failures:
                self.judge(f"{where}, complete and damaged", directory, variant)

    def one_life(
        self,
        where: str,
        directory: Path,
        variant: str,
        rng: random.Random,
        harmed: Harm | None,
    ) -> tuple[int | None, Harm | None]:
        """Start the run, and end it in some way; return the exit code, and what is still damaged.

        None in the place of the code: it failed.
        """
        stages = [each for each in STAGES if each not in VARIANTS[variant].without]
        stage = rng.choices(stages, [WEIGHTS[each] for each in stages])[0]
        kinds = [each for each in KILLS if each != DISK or self.mounts]
        how = rng.choice(kinds)
        if how == CHILD:
            stage = "export"  # before, there hardly is one
        after = 0
        if "epoch" in stages:
            newest = newest_step(directory / RUN / "checkpoints")
            after = rng.randint(newest, min(newest + LEAP, STEPS))
        delay = rng.choice((0.0, rng.uniform(0, 0.2), rng.uniform(0, 2)))
        life = Life(directory, VARIANTS[variant], rng, terminal=how == TERMINAL)
        struck = life.wait_for(stage, after)
        if struck:
            time.sleep(delay)
            struck = not life.ended()
        if struck and how == DISK:
            with full_disk(directory):
                code = life.end()
        else:
            struck = struck and strike(life, how, rng)
            code = life.end()
        harms = f" after {harmed.how} of {harmed.path.relative_to(directory)}" if harmed else ""
        what = f"{how} at {stage}{harms}" if struck else f"nothing{harms}"
        with self.lock:
            if struck:
                self.tally.kills[how] += 1
                self.tally.stages[stage] += 1
            self.say(
                f"{sum(self.tally.kills.values())} of {self.wanted}: {where}: {what}: "
                f"exit code {code}"
            )
        fine = allowed(how) if struck else {OK}
        errors = [line for line in life.lines if line.startswith("error: ")]
        if code is None:
            self.fail(where, f"hung after {what}", life.lines)
        elif code == MISTAKE and harmed and not (struck and how == DISK):
            return self.refused(where, life, code, harmed)
        elif code not in fine or len(errors) > 1 or any("Traceback" in line for line in life.lines):
            self.fail(where, f"exit code {code} after {what}", life.lines)
            return None, harmed
        # Not all damage is met in a life that ends soon.
        return code, harmed if code != OK else None

    def refused(
        self, where: str, life: Life, code: int, harmed: Harm
    ) -> tuple[int | None, Harm | None]:
        """Look at a refusal, and do what its line says."""
        what = f"{harmed.how} of {harmed.path.relative_to(life.directory)}"
        if wrong := refusal(life.lines, harmed):
            self.fail(where, f"refused after {what}: {wrong}", life.lines)
            return None, harmed
        self.tally.verdicts["refused, and mended"] += 1
        harmed.mend()
        return code, None

    def to_the_end(
        self,
        where: str,
        directory: Path,
        variant: str,
        rng: random.Random,
        harmed: Harm | None,
    ) -> None:
        """Let the run come to its end, undisturbed, with one refusal at most."""
        for _ in range(2):
            life = Life(directory, VARIANTS[variant], rng)
            code: int | None = life.end()
            if code == OK and not any("Traceback" in line for line in life.lines):
                return
            if code != MISTAKE or harmed is None:
                break
            code, harmed = self.refused(where, life, code, harmed)
            if code is None:
                return
        self.fail(where, f"exit code {code} of a life that nothing disturbed", life.lines)

    def harmed(self, directory: Path, rng: random.Random, only: Sequence[str] = ()) -> Harm | None:
        found = harm(directory, rng, only)
        if found:
            self.tally.harms[f"{found.how} of {kind(found.path, directory)}"] += 1
        return found

    def judge(self, where: str, directory: Path, variant: str) -> None:
        faults = compare(self.expected[variant], directory)
        for fault in faults:
            self.fail(where, fault)
        verdict = "; ".join(faults) or "is equal to the undisturbed run"
        self.tally.verdicts["different" if faults else "equal"] += 1
        self.say(f"{where} {verdict}")


# What a complete run tells and packages.
COMPLETE = ("result.json", "model.tar.gz", "report.html", "metrics.jsonl")


def mount(directory: Path) -> bool:
    """Put a small disk of its own there; return whether that is allowed."""
    command = ["mount", "-t", "tmpfs", "-o", "size=96m", "tmpfs", str(directory)]
    return subprocess.run(command, capture_output=True).returncode == 0


def make_fixtures(root: Path, variants: Sequence[str]) -> None:
    """Pictures, and weights of two small networks, as good as random ones are."""
    make_pictures(root / "pictures", {"train": 16, "valid": 16, "test": 4}, size=24)
    (root / "weights").mkdir()
    if "recipe" not in variants:
        return
    import torchvision  # imported here: slow, and this variant's alone

    pixels = {"mean": [0.5] * 3, "std": [0.5] * 3, "size": 32, "resize": 36}
    for number, name in enumerate(CANDIDATES):
        torch.manual_seed(number)
        state = torchvision.models.get_model(name).state_dict()
        torch.save(state, root / f"weights/{name}.pth")
        (root / f"weights/{name}.json").write_text(json.dumps(pixels))


def soak(
    kills: int,
    seed: int,
    root: Path,
    variants: Sequence[str] = tuple(VARIANTS),
    complete: bool = True,
    note: Path | None = None,
) -> Tally:
    """At least `kills` ends of lives, in two lanes side by side.

    complete: damage runs that are complete, too. note: where the tally is written after each run.
    """
    make_fixtures(root, variants)
    found = Soak(root, kills, seed, variants, complete, note)
    threads = [threading.Thread(target=found.lane, args=(number,)) for number in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return found.tally


def main() -> int:
    """Soak, and print the tally; return 1 where a run came out otherwise, or not at all."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--forked", action="store_true", help="quicker starts, by forks")
    parser.add_argument("--note", type=Path, help="a file: the tally so far, after each run")
    options = parser.parse_args()
    Life.forked = options.forked
    print(f"seed {options.seed}: replay with make soak KILLS={options.kills} SEED={options.seed}")
    with tempfile.TemporaryDirectory(prefix="packhorse-soak-") as root:
        tally = soak(options.kills, options.seed, Path(root), note=options.note)
    print(tally)
    return 1 if tally.failures else 0


if __name__ == "__main__":
    sys.exit(main())
