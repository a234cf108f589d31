"""Real runs, killed at random instants and started again, against one that was never disturbed.

`make soak` (KILLS=200 SEED=0) runs python -m tests.soak --kills 200 --seed 0. The seed decides
where and how each kill falls, as far as the machine's pace allows.
"""

import argparse
import os
import random
import signal
import subprocess
import sys
import tarfile
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path

import torch
from safetensors import torch as safetensors

from tests.conftest import Process, make_pictures, start_trainer
from tests.trainer.trainings import TIMES
from trainer.common import files
from trainer.common.errors import OK, RESUME
from trainer.training import checkpoint

# Everything that has state is on, and saving happens all the time, so that many kills fall into it.
SETTINGS = (
    "name=run", "platform=local", "platform.cache=cache", "data=folder", "model=small_cnn",
    "data.root=pictures", "data.size=16", "data.resize=18", "data.augment.trivial=true",
    "data.workers=2", "train.epochs=24", "train.batch_size=8", "train.accumulate=2",
    "train.ema_decay=0.9", "train.clip_norm=1", "train.threads=1", "optim.head_lr=3e-3",
    "checkpoint.minutes=1e-4", "checkpoint.max_cost=1",
)  # fmt: skip
# What is trained: all of the network, from pixels; or the head, on features computed first.
VARIANTS = {
    "whole network": (*SETTINGS, "data.augment.mixup=0.4", "data.augment.cutmix=1.0"),
    "frozen backbone": (
        *SETTINGS,
        "model.freeze=backbone",
        "model.cached_views=2",
        "model.head_hidden=8",
    ),
}
STEPS_PER_EPOCH = 6  # 48 pictures in batches of 8
STEPS = 24 * STEPS_PER_EPOCH
KILLS = ("kill -9 of the process group", "kill -9 of the main process", "SIGTERM", "SIGINT")
HANG = 240.0  # seconds after which a run counts as hanging


@dataclass
class Tally:
    """What a soak saw. `failures` is empty when it passed."""

    kills: Counter[str] = field(default_factory=Counter)
    phases: Counter[str] = field(default_factory=Counter)
    runs: int = 0
    failures: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        lines = [
            f"{sum(self.kills.values())} kills in {self.runs} runs, {len(self.failures)} failures"
        ]
        lines += [
            f"  {count:4d} {name}" for name, count in (*self.kills.items(), *self.phases.items())
        ]
        return "\n".join(lines + [f"  FAILED {failure}" for failure in self.failures])


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


def phase(run: Path) -> str:
    """Where a kill fell, read from what it left."""
    if not (run / "checkpoints").exists() or not (steps := checkpoint.steps(run / "checkpoints")):
        return "before the first checkpoint (start, check of the pictures, first steps)"
    if any((run / "checkpoints").glob(f"{files.TEMPORARY}*")):
        return "while a checkpoint was written"
    log = (run / "log.txt").read_text().rsplit("resumed from", 1)[-1]
    if "test_loss" in log:
        return "after training (test, package, report)"
    if _epoch_is_over(steps[-1]) and not steps[-1].name.endswith("-evaluated"):
        return "while an epoch was evaluated"
    return "between steps"


def _epoch_is_over(path: Path) -> bool:
    return int(path.name.split("-")[1]) % STEPS_PER_EPOCH == 0


def kill(process: Process, how: str) -> None:
    if how == "kill -9 of the process group":
        os.killpg(process.pid, signal.SIGKILL)
    elif how == "kill -9 of the main process":
        process.kill()
    else:
        process.send_signal(signal.Signals[how])


@dataclass(frozen=True)
class Pace:
    """Seconds of the undisturbed run: until the pictures are read, for training, and after it."""

    start: float
    training: float
    rest: float

    def instant(self, rng: random.Random, run: Path) -> tuple[bool, float]:
        """Return when to kill: (whether after the start-up, seconds after that or the start).

        Mostly in what is left of the training; else anywhere.
        """
        done = (
            max(
                (int(path.name.split("-")[1]) for path in checkpoint.steps(run / "checkpoints")),
                default=0,
            )
            / STEPS
        )
        left = (1 - done) * self.training
        return (
            (True, rng.uniform(0, left))
            if rng.random() < 0.8
            else (False, rng.uniform(0.1, self.start + left + self.rest))
        )


class Trainer:
    """A run's process, and what it prints."""

    forked = False  # started as a user does

    def __init__(self, directory: Path, settings: Sequence[str]) -> None:
        self.process = start_trainer(directory, *settings, forked=self.forked)
        self.lines: list[str] = []
        self.started = threading.Event()  # the model is built: reading pictures comes next
        self.trained = threading.Event()
        self._reader = threading.Thread(target=self._read)
        self._reader.start()

    def _read(self) -> None:
        for line in self.process.stdout or ():
            self.lines.append(line)
            if line.startswith("model:"):
                self.started.set()
            if "test_loss" in line:
                self.trained.set()
        self.started.set()
        self.trained.set()

    def end(self) -> int | None:
        """Wait for its end, and return the exit code, or None where it hung."""
        try:
            self.process.wait(HANG)
        except subprocess.TimeoutExpired:
            os.killpg(self.process.pid, signal.SIGKILL)
            return None
        finally:
            self._reader.join()
            if self.process.stdout is not None:
                self.process.stdout.close()
        return self.process.returncode


def measured(directory: Path, settings: Sequence[str], tally: Tally) -> Pace:
    """Runs undisturbed and says how long it took."""
    trainer, times = Trainer(directory, settings), [time.monotonic()]
    for event in (trainer.started, trainer.trained):
        event.wait(HANG)
        times.append(time.monotonic())
    if (code := trainer.end()) != OK:
        tally.failures.append(
            f"the undisturbed run: exit code {code}:\n{''.join(trainer.lines)[-3000:]}"
        )
    times.append(time.monotonic())
    return Pace(*(after - before for before, after in pairwise(times)))


def disturbed_run(
    directory: Path,
    settings: Sequence[str],
    rng: random.Random,
    pace: Pace,
    kills: int,
    tally: Tally,
    lock: threading.Lock,
) -> None:
    """Kill one run `kills` times on its way, starting it again until it is complete."""
    for _ in range(kills):
        how, (after_start, delay) = rng.choice(KILLS), pace.instant(rng, directory / "runs/run")
        trainer = Trainer(directory, settings)
        if after_start:
            trainer.started.wait(HANG)
        try:
            trainer.process.wait(delay)
        except subprocess.TimeoutExpired:
            kill(trainer.process, how)
            with lock:
                tally.kills[how] += 1
                tally.phases[phase(directory / "runs/run")] += 1
        code = trainer.end()
        if code is None:
            tally.failures.append(f"{directory.name}: hung after {how}")
        elif how.startswith("SIG") and code not in (OK, RESUME, -signal.Signals[how]):
            tally.failures.append(
                f"{directory.name}: exit code {code} after {how}:\n{''.join(trainer.lines)[-2000:]}"
            )
        if code == OK:
            break
    last = Trainer(directory, settings)
    if (code := last.end()) != OK:
        tally.failures.append(f"{directory.name}: exit code {code}:\n{''.join(last.lines)[-2000:]}")


def compare(expected: object, directory: Path) -> list[str]:
    """Return what is wrong with a complete run: nothing, if it equals the undisturbed one."""
    faults = []
    if where := difference(expected, outcome(directory / "runs/run")):
        faults.append(f"differs from the undisturbed run in {where}")
    if left := leftovers(directory / "runs"):
        faults.append(f"left behind {left}")
    return faults


def soak(kills: int, seed: int, root: Path) -> Tally:
    """At least `kills` kills, in one lane a variant, side by side."""
    make_pictures(root / "pictures", {"train": 16, "valid": 16, "test": 4}, size=24)
    tally, lock = Tally(), threading.Lock()

    def new_directory(name: str) -> Path:
        directory = root / name
        directory.mkdir()
        (directory / "pictures").symlink_to(root / "pictures")
        return directory

    def lane(variant: str) -> None:
        rng, settings = random.Random(f"{seed}/{variant}"), VARIANTS[variant]
        undisturbed = new_directory(variant)
        pace = measured(undisturbed, settings, tally)
        expected = None if tally.failures else outcome(undisturbed / "runs/run")
        while sum(tally.kills.values()) < kills and not tally.failures:
            with lock:
                tally.runs += 1
                directory = new_directory(f"{variant} {tally.runs}")
            disturbed_run(directory, settings, rng, pace, rng.randint(3, 9), tally, lock)
            if not tally.failures:
                faults = compare(expected, directory)
                tally.failures += [f"{directory.name}: {fault}" for fault in faults]
                verdict = "; ".join(faults) or "is equal to the undisturbed run"
                done = sum(tally.kills.values())
                print(f"{done} of {kills} kills; {directory.name} {verdict}", flush=True)

    threads = [threading.Thread(target=lane, args=(variant,)) for variant in VARIANTS]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return tally


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    print(f"seed {options.seed}: replay with make soak KILLS={options.kills} SEED={options.seed}")
    with tempfile.TemporaryDirectory(prefix="packhorse-soak-") as root:
        tally = soak(options.kills, options.seed, Path(root))
    print(tally)
    return 1 if tally.failures else 0


if __name__ == "__main__":
    sys.exit(main())
