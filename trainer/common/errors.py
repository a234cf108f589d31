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
    """Add `path` to an OSError raised within: errors of write and seek name no file."""
    try:
        yield
    except OSError as error:
        error.filename = str(path)
        raise


class PackhorseError(Exception):
    """The base of this project's errors. The message is one line, for a person."""


class UserError(PackhorseError, ValueError):
    """Something that the user can fix. The message says what is wrong, where, and what to do."""


class MachineFault(UserError):
    """The machine can't do it now, because its disk is full, say. The input may be right."""


class Unreadable(MachineFault):
    """A file can't be read now, after several tries. Its content may be good or bad."""


class Interrupted(PackhorseError):
    """The run was asked to stop and has saved its state. The message names who asked."""


AGAIN = "then start the same command again"
LATER = "start the same command again later"
ELSEWHERE = (
    "choose another directory with platform.runs=DIR, platform.cache=DIR or data.root=DIR, "
    "whichever it lies in"
)
MEMORY_FULL = (
    "this machine is out of memory: close other programs, or lower data.workers or "
    f"train.batch_size, {AGAIN}"
)
# What to do about each error of a file operation. Names, not numbers: some systems lack some of
# them. Errors that only a bug can cause (EFAULT) are not listed.
_REMEDIES = {
    "ENOSPC": f"no space is left: free some, or {ELSEWHERE}",
    "EDQUOT": f"the disk quota is used up: free some, or {ELSEWHERE}",
    "EFBIG": (
        f"the file is larger than its file system or ulimit -f allows: allow more, or {ELSEWHERE}"
    ),
    "EMLINK": f"its directory is full: delete some of its files, or {ELSEWHERE}",
    "EACCES": f"permission denied: give this user access, run as a user who has it, or {ELSEWHERE}",
    "EPERM": f"not permitted: run as a user who may use it, or {ELSEWHERE}",
    "EROFS": f"the file system is read-only: {ELSEWHERE}",
    "EEXIST": f"a file is in the place of this directory: move the file away, or {ELSEWHERE}",
    "ENOTDIR": f"a file is in the place of its directory: move the file away, or {ELSEWHERE}",
    "EISDIR": f"a directory is in the place of this file: move the directory away, {AGAIN}",
    "ENOTEMPTY": f"a directory that isn't empty is in its place: move it away, {AGAIN}",
    "ENAMETOOLONG": "the name is too long: give a shorter one",
    "EILSEQ EINVAL": (
        "its file system doesn't take this name or this operation (a Windows disk allows no "
        f'":" in names, say): rename it, or {ELSEWHERE}'
    ),
    "EOVERFLOW": f"its file system returns numbers too large for this system: {ELSEWHERE}",
    "ELOOP": f"its symbolic links form a loop: fix them, {AGAIN}",
    "EXDEV": f"its directory lies on two file systems: {ELSEWHERE}",
    "EBUSY ETXTBSY": f"another program is using it: close that program, {AGAIN}",
    "EIO": (
        "the disk, or the network to it, fails (input/output error): fix that (dmesg may say "
        f"more), {AGAIN}"
    ),
    "EREMOTEIO ENODATA EHWPOISON ENOMEDIUM EMEDIUMTYPE": (
        f"the disk fails: fix that (dmesg may say more), {AGAIN}"
    ),
    "EUCLEAN EBADMSG": (
        f"its file system is damaged: have it checked (fsck, zpool scrub, btrfs scrub), {AGAIN}"
    ),
    "ENOKEY EKEYEXPIRED EKEYREVOKED EKEYREJECTED": (
        f"it is encrypted, and its key isn't loaded or has expired: unlock it, {AGAIN}"
    ),
    "ESTALE": f"the network's file system has lost it (stale file handle): mount it again, {AGAIN}",
    "ENOENT": f"it is missing, or was removed meanwhile: put it back, {AGAIN}",
    "EMFILE": f"this process has too many files open: allow more with ulimit -n 65536, {AGAIN}",
    "ENFILE": f"this machine has too many files open: close the programs that hold them, {AGAIN}",
    "ENOMEM ENOBUFS": (
        f"no memory is left for it: close other programs, or lower data.workers, {AGAIN}"
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
# Errors of a network or user-space file system whose server is gone. Sockets raise them too, but
# name no file.
LOST = _numbers(
    "ETIMEDOUT ETIME ENOTCONN ECONNABORTED ECONNREFUSED ECONNRESET EHOSTDOWN EHOSTUNREACH "
    "ENETDOWN ENETUNREACH ENETRESET ENODEV ENXIO ESHUTDOWN EPIPE ENOLINK ECOMM EPROTO "
    "EREMCHG EREMOTE EALREADY EINPROGRESS ECANCELED"
)
# Sockets, pipes and processes raise these too, without a file name.
_OF_OTHERS = LOST | _numbers("EAGAIN EINTR EINVAL ENOTTY ESPIPE ENOSYS")

# Errors that may be gone with the next call.
TRANSIENT = _numbers("EIO ESTALE ETIMEDOUT ENOMEM EMFILE ENFILE EINTR EAGAIN EBUSY")


def install_command(extra: str) -> str:
    """Return the command that adds an extra of pyproject.toml to the environment that runs this.

    The project is installed from its folder, since it isn't published.
    """
    if Path(sys.prefix).resolve() != (PROJECT / ".venv").resolve():
        return shlex.join([sys.executable, "-m", "pip", "install", "-e", f"{PROJECT}[{extra}]"])
    if Path.cwd() == PROJECT:
        return f"make setup EXTRA={shlex.quote(extra)}"
    return f"make -C {shlex.quote(str(PROJECT))} setup EXTRA={shlex.quote(extra)}"


@contextmanager
def needed_by(what: str, extra: str) -> Iterator[None]:
    """Import optional packages inside. Raise UserError where one is not installed.

    what: the setting that needs them, as the user wrote it. extra: the extra that installs them.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        raise UserError(f"{what} needs {error.name}: {install_command(extra)}") from error


def machine_fault(error: OSError) -> str | None:
    """Return the line for a fault of the user's machine (a full disk, no permission).

    None where `error` is another one.
    """
    number = error.errno or 0
    if number in _OF_OTHERS and not error.filename:
        return None
    remedy = REMEDIES.get(number)
    if remedy is None and number in LOST:
        reason = (error.strerror or "").lower()
        remedy = f"its file system does not answer ({reason}): fix that, {AGAIN}"
    if remedy is None:
        return None
    return f"{error.filename or 'a file of this run'}: {remedy}"


def is_machines(error: Exception) -> bool:
    """Return whether the machine failed, so that the same work may succeed once it is fixed."""
    if isinstance(error, OSError):
        return machine_fault(error) is not None and error.errno != errno.ENAMETOOLONG
    return isinstance(error, MachineFault)
