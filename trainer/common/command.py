"""The edge of every command: whatever goes wrong becomes one line and an exit code.

Standard library only: what explains Hydra's errors, and what shows a line, is handed in.
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
# Looked at before the trainer sets it, so that Hydra raises its errors.
WANTS_TRACEBACK = os.environ.get("HYDRA_FULL_ERROR") == "1"


def guarded(work: Callable[[], int | None], say: Say, explain: Explain | None = None) -> int:
    """Do the work and return its exit code, or that of what it raised, after one line.

    A fault of ours is raised on, for its traceback; so is a mistake with HYDRA_FULL_ERROR=1.
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
    """End this process at once, with what was registered for its end done.

    Python would take down each module and thread first. With PyTorch and the exporter loaded that
    is seconds in which the prompt isn't back, and nothing is left to be done in them.

    module: the globals of the module that was run. Where a program runs it within itself (runpy),
    SystemExit is raised instead.
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
    """Return the level of the line: being asked to stop is no error."""
    if isinstance(error, Interrupted):
        return logging.WARNING
    return logging.ERROR


def verdict(error: Exception, explain: Explain | None = None) -> tuple[int, str]:
    """Return the exit code for what went wrong, and the line that the user sees."""
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
    """Return what the user can mend, in one line; None for a fault of ours.

    explain: gives the line for errors of a library, such as Hydra's; None: it knows none.
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
