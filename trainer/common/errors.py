"""The project's one tree of errors, its exit codes, and the remedies for what the system refuses.

Standard library only: a copy of this file travels in the model package.
"""

import errno
import shlex
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

PROJECT = Path(__file__).parents[2]

OK = 0
FAULT = 1  # a fault of ours: the traceback is shown
MISTAKE = 2  # the user's input or machine: one line says what, where and what to do
RESUME = 75  # EX_TEMPFAIL of sysexits.h: interrupted and saved; the same command goes on
# EX_IOERR of sysexits.h: what a sweep's trial, which finds TRIAL in its environment, says instead
# of MISTAKE where the machine is at fault. Its driver tries it again.
MACHINE = 74
TRIAL = "PACKHORSE_TRIAL"


class PackhorseError(Exception):
    """What this project raises of its own accord. The message is one line, for a person."""


class UserError(PackhorseError, ValueError):
    """Something the user can mend. Its message says what is wrong, where, and what to do."""


class MachineFault(UserError):
    """What was asked for may be right, but the machine can't do it now: its disk is full, say."""


class Unreadable(MachineFault):
    """A file can't be read now, however often it is tried. Whether it is good, nobody knows."""


class Interrupted(PackhorseError):
    """The run was asked to stop and has saved its state. The message names who asked."""


AGAIN = "then start the same command again"
ELSEWHERE = (
    "choose another directory with platform.runs=DIR, platform.cache=DIR or data.root=DIR, "
    "whichever it lies in"
)
MEMORY_FULL = (
    "this machine's memory is full: end what else uses it, "
    f"or lower data.workers or train.batch_size, {AGAIN}"
)
REMEDIES = {
    errno.ENOSPC: f"no space is left: free some, or {ELSEWHERE}",
    errno.EDQUOT: f"the disk quota is used up: free some, or {ELSEWHERE}",
    errno.EACCES: f"permission denied: let this user use it, run as one who may, or {ELSEWHERE}",
    errno.EPERM: f"not permitted: run as a user who may use it, or {ELSEWHERE}",
    errno.EROFS: f"the file system is read-only: {ELSEWHERE}",
    errno.EEXIST: f"a file is where this directory must be made: move it away, or {ELSEWHERE}",
    errno.ENOTDIR: (
        f"a file is where a directory must be made for it: move it away, or {ELSEWHERE}"
    ),
    errno.ENAMETOOLONG: "the name is too long: give a shorter one",
    errno.EIO: (
        "the disk, or the network to it, fails (input/output error): "
        f"mend that (dmesg may say more), {AGAIN}"
    ),
    errno.ESTALE: (
        f"the network's file system has lost it (stale file handle): mount it anew, {AGAIN}"
    ),
    errno.ENOENT: f"it is not there, or not any more: bring it back, {AGAIN}",
    errno.EMFILE: f"this process has too many files open: allow more with ulimit -n 65536, {AGAIN}",
    errno.ENFILE: f"this machine has too many files open: end what holds them, {AGAIN}",
    errno.ENOMEM: (
        f"no memory is left for it: end what else uses it, or lower data.workers, {AGAIN}"
    ),
}
# What a network's file system, or one in user space, says when its server is gone. Sockets say the
# same, but name no file.
LOST = frozenset(
    {
        errno.ETIMEDOUT,
        errno.ENOTCONN,
        errno.ECONNABORTED,
        errno.ECONNREFUSED,
        errno.ECONNRESET,
        errno.EHOSTDOWN,
        errno.EHOSTUNREACH,
        errno.ENETDOWN,
        errno.ENETUNREACH,
        errno.ENODEV,
        errno.ENXIO,
    }
)

# What one call may meet and the next one not.
TRANSIENT = frozenset(
    {
        errno.EIO,
        errno.ESTALE,
        errno.ETIMEDOUT,
        errno.ENOMEM,
        errno.EMFILE,
        errno.ENFILE,
    }
)


def install_command(extra: str) -> str:
    """Return the command that adds an extra of pyproject.toml to the environment that runs this.

    The project is installed from where it lies, since it is published nowhere.
    """
    if Path(sys.prefix).resolve() != (PROJECT / ".venv").resolve():
        return shlex.join([sys.executable, "-m", "pip", "install", "-e", f"{PROJECT}[{extra}]"])
    if Path.cwd() == PROJECT:
        return f"make setup EXTRA={shlex.quote(extra)}"
    return f"make -C {shlex.quote(str(PROJECT))} setup EXTRA={shlex.quote(extra)}"


@contextmanager
def needed_by(what: str, extra: str) -> Iterator[None]:
    """Import optional packages inside. Raise UserError where one is not installed.

    what: needs them, as the user wrote it. extra: brings them.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        raise UserError(f"{what} needs {error.name}: {install_command(extra)}") from error


def machine_fault(error: OSError) -> str | None:
    """Return the one line for a fault of the user's machine (a full disk, no permission).

    None where `error` is no such fault.
    """
    remedy = REMEDIES.get(error.errno or 0)
    if remedy is None and error.errno in LOST and error.filename:
        reason = (error.strerror or "").lower()
        remedy = f"its file system does not answer ({reason}): mend that, {AGAIN}"
    if remedy is None:
        return None
    return f"{error.filename or 'the run directory'}: {remedy}"


def is_machines(error: Exception) -> bool:
    """Return whether the machine failed, so that the same may succeed when it is mended."""
    if isinstance(error, OSError):
        return machine_fault(error) is not None and error.errno != errno.ENAMETOOLONG
    return isinstance(error, MachineFault)
