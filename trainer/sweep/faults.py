"""Whether a trial failed, or its machine did.

A trial's own failure is final: it diverged, a setting is bad, the GPU's memory is too small. A
failure of the machine says nothing about the trial: a full disk, a lost mount, a killed process.
Then the driver tries again, and the same command does later. Some ends can be either: Linux kills a
process when memory is short, whichever process used it, and a crash may come from the program or
the hardware. They count as the trial's failure if every try ends so, on a machine that completes
others.
"""

import re
import signal
from dataclasses import dataclass
from enum import Enum
from pathlib import Path

from trainer.common.errors import FAULT, MACHINE, RESUME

CRASHES = frozenset({signal.SIGSEGV, signal.SIGABRT, signal.SIGILL, signal.SIGFPE})
# Text in PyTorch's tracebacks when a GPU, its driver or a kernel fails.
GPU_FAILS = re.compile(r"CUDA error|CUBLAS_STATUS|CUDNN_STATUS|No CUDA GPUs")
# See proc(5): oom_kill counts processes that Linux killed for lack of memory.
VMSTAT = Path("/proc/vmstat")


class Whose(Enum):
    """Who is at fault."""

    TRIAL = "trial"
    MACHINE = "machine"
    OPEN = "open"


@dataclass(frozen=True)
class Fault:
    """The failure of a trial's process: whose fault it is, and the reason in one line."""

    whose: Whose
    reason: str


def judge(code: int, said: str, memory_was_short: bool) -> Fault:
    """Return whose fault the end of a trial's process is.

    code: its exit code, of `subprocess.Popen`. said: the end of its output.
    memory_was_short: whether Linux ended processes for lack of memory while it ran.
    """
    if code == -signal.SIGKILL and memory_was_short:
        reason = (
            "this machine's memory was full, and Linux killed it: lower train.batch_size or "
            "data.workers, or run fewer at once with sweep.parallel"
        )
        return Fault(Whose.OPEN, reason)
    if code < 0:
        whose = Whose.MACHINE
        if -code in CRASHES:
            whose = Whose.OPEN
        return Fault(whose, f"killed by {name_of(-code)}")
    lines = [line for line in said.splitlines() if line.strip()]
    of_gpu = [line for line in lines if GPU_FAILS.search(line)]
    if code == FAULT and of_gpu:
        return Fault(Whose.OPEN, of_gpu[-1])
    reason = f"exit code {code}"
    if lines:
        reason = lines[-1].removeprefix("warning: ").removeprefix("error: ")
    if code in (MACHINE, RESUME):  # RESUME: somebody stopped only this process, or it hung
        return Fault(Whose.MACHINE, reason)
    return Fault(Whose.TRIAL, reason)


def name_of(number: int) -> str:
    """Return a signal's name. Real-time signals have none."""
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def memory_kills() -> int:
    """Return how many processes Linux has killed for lack of memory since it booted.

    0 where it doesn't say.
    """
    try:
        words = VMSTAT.read_text().split()
    except OSError:
        return 0
    return int(dict(zip(words[::2], words[1::2], strict=False)).get("oom_kill", "0"))
