"""The processes of a sweep's trials, by the sweep's own code."""

import ctypes
import json
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, TypedDict

from trainer.common import files, sessions
from trainer.common.errors import TRIAL, naming
from trainer.sweep import faults
from trainer.sweep.faults import Fault
from trainer.sweep.ledger import Trial

BATCH_LOCK = ".lock-batch"  # lock that a batch holds in each of its trials' directories
TAIL = 10_000  # characters of a process's output that show why it failed
PR_SET_PDEATHSIG = 1  # linux/prctl.h


class Request(TypedDict, total=False):
    """What a `Worker` is asked for: to train trials of a sweep, or to run one to its end."""

    output: str  # where its output is appended
    sweep: str  # absolute directory
    trials: list[int]  # of it
    run: list[str]  # the command line of one


@dataclass(frozen=True)
class Program:
    """The code that a sweep's processes run.

    source: its directory. revision: of it. gpu: whether a process may have a GPU of its own.
    """

    source: Path
    revision: str
    gpu: bool

    def start(
        self, arguments: Sequence[str], slot: int, stdin: int, output: IO[bytes] | int
    ) -> sessions.Child:
        """Start `python -m ARGUMENTS`. slot: chooses the GPU."""
        environment = {key: value for key, value in os.environ.items() if key != "HYDRA_FULL_ERROR"}
        search = [str(self.source.absolute())]
        if os.environ.get("PYTHONPATH"):
            search.append(os.environ["PYTHONPATH"])
        environment |= {
            "PYTHONPATH": os.pathsep.join(search),
            "PACKHORSE_REVISION": self.revision,
            TRIAL: "1",
        }
        if self.gpu and len(devices := gpus()) > 1:
            environment["CUDA_VISIBLE_DEVICES"] = devices[slot % len(devices)]
        return sessions.Child(  # which the driver ends, when it is asked to end
            [*sessions.python(), "-m", *arguments],
            stdin=stdin,
            stdout=output,
            stderr=subprocess.STDOUT,
            env=environment,
            preexec_fn=end_with_parent,
        )


class Worker:
    """A process that loads what trials need, and then waits to be asked for some.

    Loading takes seconds: it does it while the driver makes the trials, and once for all that it is
    asked for.
    """

    def __init__(self, program: Program, slot: int) -> None:
        self.slot = slot
        self.process = program.start(
            ["trainer.sweep.batch"], slot, subprocess.PIPE, subprocess.DEVNULL
        )

    def ask(self, request: Request) -> None:
        """Ask for one thing more. One that has ended doesn't answer."""
        assert self.process.stdin is not None
        with suppress(BrokenPipeError):
            self.process.stdin.write(f"{json.dumps(request)}\n".encode())
            self.process.stdin.flush()

    def end(self) -> None:
        """End it, where it waits."""
        assert self.process.stdin is not None
        with suppress(BrokenPipeError):
            self.process.stdin.close()
        self.process.terminate()
        self.process.wait()


@dataclass
class TrialProcess:
    """One process: a trial, or several heads that it trains one after the other."""

    trials: list[Trial]
    slot: int  # which of the processes that run at once; chooses the GPU
    output: Path  # where its output is appended
    # None: it waits for a process that a killed driver left behind.
    process: subprocess.Popen[bytes] | None = None
    worker: Worker | None = None  # the process, where it can do more
    epoch: int = 0  # the last one reported
    pruned: bool = False
    memory_kills: int = field(default=0, init=False)  # before it was started

    def start(self, program: Program, arguments: Sequence[str]) -> None:
        """Start `python -m ARGUMENTS`."""
        self.memory_kills = faults.memory_kills()
        with naming(self.output):
            opened = self.output.open("ab")
        with opened as output:
            self.process = program.start(arguments, self.slot, subprocess.DEVNULL, output)

    def share(self, worker: Worker, request: Request) -> None:
        """Have a worker do it."""
        self.memory_kills = faults.memory_kills()
        self.worker, self.process = worker, worker.process
        worker.ask({**request, "output": str(self.output.absolute())})

    def code(self) -> int | None:
        """Return its exit code; None: it runs, or isn't started."""
        if self.process is None:
            return None
        return self.process.poll()

    def fault(self) -> Fault:
        """Return why the ended process failed, from its exit code and the end of its output."""
        code = self.code()
        assert code is not None
        said = ""
        if self.output.exists():
            said = self.output.read_text(errors="replace")[-TAIL:]
        return faults.judge(code, said, faults.memory_kills() > self.memory_kills)


def end(jobs: Sequence[TrialProcess]) -> None:
    """Have every process save its state and end."""
    running = [job.process for job in jobs if job.process is not None]
    for process in running:
        process.terminate()
    for process in running:
        process.wait()


def in_use(run: Path) -> bool:
    """Return whether a process trains this trial, or is about to."""
    return files.is_locked(run) or files.is_locked(run, BATCH_LOCK)


def gpus() -> list[str]:
    """Return the GPUs that this process may use, as CUDA_VISIBLE_DEVICES names them."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return [name for name in visible.split(",") if name]
    driver = Path("/proc/driver/nvidia/gpus")
    return [str(number) for number, _ in enumerate(driver.iterdir())] if driver.is_dir() else []


# Loaded here, since it can't be between fork and exec.
_libc = ctypes.CDLL(None) if sys.platform == "linux" else None


def end_with_parent() -> None:
    """Let Linux send this process SIGTERM when the driver dies.

    Then it saves, and the machine is free. On other systems it trains to its end.
    """
    if _libc is not None:
        _libc.prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
