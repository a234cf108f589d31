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


@contextmanager
def naming(path: object) -> Iterator[None]:
    """Let an OSError within name `path`: a write, and a search for a file's end, name no file."""
    try:
        yield
    except OSError as error:
        error.filename = str(path)
        raise


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
LATER = "start the same command again later"
ELSEWHERE = (
    "choose another directory with platform.runs=DIR, platform.cache=DIR or data.root=DIR, "
    "whichever it lies in"
)
MEMORY_FULL = (
    "this machine's memory is full: end what else uses it, "
    f"or lower data.workers or train.batch_size, {AGAIN}"
)
# Every error that a file operation can end with, by what is to be done. Names, since a system may
# lack some of them. What the standard gives to bugs alone (EFAULT) is no one's to mend, and isn't
# here.
_REMEDIES = {
    "ENOSPC": f"no space is left: free some, or {ELSEWHERE}",
    "EDQUOT": f"the disk quota is used up: free some, or {ELSEWHERE}",
    "EFBIG": (
        f"the file is larger than its file system or ulimit -f allows: allow more, or {ELSEWHERE}"
    ),
    "EMLINK": f"its directory can hold no more: remove some of it, or {ELSEWHERE}",
    "EACCES": f"permission denied: let this user use it, run as one who may, or {ELSEWHERE}",
    "EPERM": f"not permitted: run as a user who may use it, or {ELSEWHERE}",
    "EROFS": f"the file system is read-only: {ELSEWHERE}",
    "EEXIST": f"a file is where this directory must be made: move it away, or {ELSEWHERE}",
    "ENOTDIR": f"a file is where a directory must be made for it: move it away, or {ELSEWHERE}",
    "EISDIR": f"a directory is where this file must be: move it away, {AGAIN}",
    "ENOTEMPTY": f"a directory is in its place, and isn't empty: move it away, {AGAIN}",
    "ENAMETOOLONG": "the name is too long: give a shorter one",
    "EILSEQ EINVAL": (
        "its file system doesn't take this name or this operation (a Windows disk allows no "
        f'":" in names, say): rename it, or {ELSEWHERE}'
    ),
    "EOVERFLOW": f"its file system gives numbers that this system can't hold: {ELSEWHERE}",
    "ELOOP": f"its symbolic links lead in a circle: mend them, {AGAIN}",
    "EXDEV": f"its directory lies on two file systems: {ELSEWHERE}",
    "EBUSY ETXTBSY": f"something else uses it: end that, {AGAIN}",
    "EIO": (
        "the disk, or the network to it, fails (input/output error): "
        f"mend that (dmesg may say more), {AGAIN}"
    ),
    "EREMOTEIO ENODATA EHWPOISON ENOMEDIUM EMEDIUMTYPE": (
        f"the disk fails: mend that (dmesg may say more), {AGAIN}"
    ),
    "EUCLEAN EBADMSG": (
        f"its file system is damaged: have it checked (fsck, zpool scrub, btrfs scrub), {AGAIN}"
    ),
    "ENOKEY EKEYEXPIRED EKEYREVOKED EKEYREJECTED": (
        f"it is encrypted, and its key isn't loaded or has expired: unlock it, {AGAIN}"
    ),
    "ESTALE": f"the network's file system has lost it (stale file handle): mount it anew, {AGAIN}",
    "ENOENT": f"it is not there, or not any more: bring it back, {AGAIN}",
    "EMFILE": f"this process has too many files open: allow more with ulimit -n 65536, {AGAIN}",
    "ENFILE": f"this machine has too many files open: end what holds them, {AGAIN}",
    "ENOMEM ENOBUFS": (
        f"no memory is left for it: end what else uses it, or lower data.workers, {AGAIN}"
    ),
    "EINTR EAGAIN EDEADLK": f"its file system was too busy to do it: {LATER}",
    "ENOSYS EOPNOTSUPP ENOTSUP ENOLCK ENOTTY ESPIPE": (
        f"its file system can't do what a run needs: {ELSEWHERE}"
    ),
}


def _numbers(names: str) -> frozenset[int]:
    """Return the numbers of those of the errors that this system has."""
    return frozenset(getattr(errno, name) for name in names.split() if hasattr(errno, name))


REMEDIES = {number: text for names, text in _REMEDIES.items() for number in _numbers(names)}
# What a network's file system, or one in user space, says when its server is gone. Sockets say the
# same, but name no file.
LOST = _numbers(
    "ETIMEDOUT ETIME ENOTCONN ECONNABORTED ECONNREFUSED ECONNRESET EHOSTDOWN EHOSTUNREACH "
    "ENETDOWN ENETUNREACH ENETRESET ENODEV ENXIO ESHUTDOWN EPIPE ENOLINK ECOMM EPROTO "
    "EREMCHG EREMOTE EALREADY EINPROGRESS ECANCELED"
)
# Said of sockets, pipes and processes too, where no file is named.
_OF_OTHERS = LOST | _numbers("EAGAIN EINTR EINVAL ENOTTY ESPIPE ENOSYS")

# What one call may meet and the next one not.
TRANSIENT = _numbers("EIO ESTALE ETIMEDOUT ENOMEM EMFILE ENFILE EINTR EAGAIN EBUSY")


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
    number = error.errno or 0
    if number in _OF_OTHERS and not error.filename:
        return None
    remedy = REMEDIES.get(number)
    if remedy is None and number in LOST:
        reason = (error.strerror or "").lower()
        remedy = f"its file system does not answer ({reason}): mend that, {AGAIN}"
    if remedy is None:
        return None
    return f"{error.filename or 'a file of this run'}: {remedy}"


def is_machines(error: Exception) -> bool:
    """Return whether the machine failed, so that the same may succeed when it is mended."""
    if isinstance(error, OSError):
        return machine_fault(error) is not None and error.errno != errno.ENAMETOOLONG
    return isinstance(error, MachineFault)
