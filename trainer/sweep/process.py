"""The processes of a sweep's trials, by the sweep's own code."""

import ctypes
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from trainer.common import files, sessions
from trainer.common.errors import TRIAL, naming
from trainer.sweep import faults
from trainer.sweep.faults import Fault
from trainer.sweep.ledger import Trial

BATCH_LOCK = ".lock-batch"  # lock that a batch holds in each of its trials' directories
TAIL = 10_000  # characters of a process's output that show why it failed
PR_SET_PDEATHSIG = 1  # linux/prctl.h


@dataclass
class TrialProcess:
    """One process: a trial, or several heads that it trains one after the other."""

    trials: list[Trial]
    slot: int  # which of the processes that run at once; chooses the GPU
    output: Path  # where its output is appended
    # None: it waits for a process that a killed driver left behind.
    process: subprocess.Popen[bytes] | None = None
    epoch: int = 0  # the last one reported
    pruned: bool = False
    memory_kills: int = field(default=0, init=False)  # before it was started

    def start(self, arguments: Sequence[str], source: Path, revision: str, gpu: bool) -> None:
        """Start `python -m ARGUMENTS` with the code in `source`.

        revision: of that code. gpu: whether it may have a GPU of its own.
        """
        environment = {key: value for key, value in os.environ.items() if key != "HYDRA_FULL_ERROR"}
        search = [str(source.absolute())]
        if os.environ.get("PYTHONPATH"):
            search.append(os.environ["PYTHONPATH"])
        environment |= {
            "PYTHONPATH": os.pathsep.join(search),
            "PACKHORSE_REVISION": revision,
            TRIAL: str(self.trials[0].number),
        }
        if gpu and len(devices := gpus()) > 1:
            environment["CUDA_VISIBLE_DEVICES"] = devices[self.slot % len(devices)]
        self.memory_kills = faults.memory_kills()
        with naming(self.output):
            opened = self.output.open("ab")
        with opened as output:
            self.process = sessions.Child(  # which the driver ends, when it is asked to end
                [*sessions.python(), "-m", *arguments],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env=environment,
                preexec_fn=end_with_parent,
            )

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
