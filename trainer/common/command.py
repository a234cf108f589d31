"""The outermost layer of every command: each error becomes one line and an exit code.

Standard library only: callers pass in what explains Hydra's errors, and what shows a line.
"""

import atexit
import logging
import os
import sys
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import NoReturn

from trainer.common.errors import (
    FAULT,
    MACHINE,
    MEMORY_FULL,
    MISTAKE,
    OK,
    RESUME,
    TRIAL,
    Interrupted,
    UserError,
    is_machines,
    machine_fault,
)

Explain = Callable[[Exception], str | None]
Say = Callable[[int, str], None]
# Read before the trainer sets it to make Hydra raise its errors.
WANTS_TRACEBACK = os.environ.get("HYDRA_FULL_ERROR") == "1"


def guarded(work: Callable[[], int | None], say: Say, explain: Explain | None = None) -> int:
    """Do the work and return its exit code, or show its error in one line and return that one's.

    Raise bugs again, for their traceback, and with HYDRA_FULL_ERROR=1 the user's mistakes too.
    say(level, line): shows the line.
    """
    try:
        return work() or OK
    except Exception as error:
        code, line = verdict(error, explain)
        if wants_traceback(code):
            raise
        say(level(error), line)
        return code


def leave(code: int, module: Mapping[str, object]) -> NoReturn:
    """End this process at once, after its atexit functions.

    Python would first tear down each module and thread. With PyTorch and the exporter loaded, that
    keeps the prompt away for seconds, for nothing.

    module: the globals of the module that was run. If another program runs it (runpy), raise
    SystemExit instead.
    """
    if vars(sys.modules["__main__"]) is not module:
        sys.exit(code)
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError):
            stream.flush()
    os._exit(code)


def wants_traceback(code: int) -> bool:
    """Return whether the user sees the traceback of an error with this exit code."""
    return code == FAULT or (code == MISTAKE and WANTS_TRACEBACK)


def level(error: Exception) -> int:
    """Return the level of the line: a requested stop is no error."""
    if isinstance(error, Interrupted):
        return logging.WARNING
    return logging.ERROR


def verdict(error: Exception, explain: Explain | None = None) -> tuple[int, str]:
    """Return the exit code of an error, and the line that the user sees."""
    if isinstance(error, Interrupted):
        saved = "everything is saved: start the same command again to continue"
        return RESUME, f"stopped by {error}; {saved}"
    line = one_line(error, explain)
    if line is None:
        return FAULT, f"{type(error).__name__}: {error}"
    if is_machines(error) and TRIAL in os.environ:
        return MACHINE, line
    return MISTAKE, line


def one_line(error: Exception, explain: Explain | None = None) -> str | None:
    """Return the line for an error that the user can fix; None for a bug.

    explain: returns the line for a library's errors, such as Hydra's; None for others.
    """
    if isinstance(error, UserError):
        return str(error)
    if type(error).__name__ == "OutOfMemoryError":  # torch's; it is not imported for its name
        reason = str(error).split(". ")[0]
        remedy = "lower train.batch_size, or split the batches with train.accumulate=2 or more"
        return f"the GPU's memory is full ({reason}); {remedy}"
    # torch's allocator of the CPU's memory has no error of its own.
    if isinstance(error, MemoryError) or "DefaultCPUAllocator" in str(error):
        return MEMORY_FULL
    line = None
    if explain is not None:
        line = explain(error)
    if line is None and isinstance(error, OSError):
        line = machine_fault(error)
    return line
