"""What a run tells the shell: its exit codes, and one line for each mistake that a user can mend."""

import errno
import shlex
import sys
from pathlib import Path

PROJECT = Path(__file__).parents[2]

OK = 0
FAULT = 1  # a fault of ours: the traceback is shown
MISTAKE = 2  # the user's input or machine: one line says what, where and what to do
RESUME = 75  # EX_TEMPFAIL of sysexits.h: interrupted and saved; the same command goes on

MEMORY_FULL = "this machine's memory is full: end what else uses it, or lower data.workers or train.batch_size, then start the same command again"
# What a network's file system, or one in user space, says when its server is gone. Sockets say the same, but name no file.
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


class UserError(ValueError):
    """Something the user can mend. Its message says what is wrong, where, and what to do, in one line."""


class Unreadable(UserError):
    """A file can't be read now, however often it is tried. What is in it, good or broken, nobody knows."""


class Interrupted(Exception):
    """The run was asked to stop and has saved its state. The message names who asked."""


def install_command(extra: str) -> str:
    """Return the command that adds an extra of pyproject.toml to the environment that runs this.

    The project is installed from where it lies, since it is published nowhere.
    """
    if Path(sys.prefix).resolve() == (PROJECT / ".venv").resolve():
        where = "" if Path.cwd() == PROJECT else f" -C {shlex.quote(str(PROJECT))}"
        return f"make{where} setup EXTRA={extra}"
    return f"{sys.executable} -m pip install -e {shlex.quote(f'{PROJECT}[{extra}]')}"


def machine_fault(error: OSError) -> str | None:
    """The one line for a fault of the user's machine (a full disk, no permission), or None where `error` is no such fault."""
    again = "then start the same command again"
    elsewhere = "choose another directory with platform.runs=DIR, platform.cache=DIR or data.root=DIR, whichever it lies in"
    remedies = {
        errno.ENOSPC: f"no space is left: free some, or {elsewhere}",
        errno.EDQUOT: f"the disk quota is used up: free some, or {elsewhere}",
        errno.EACCES: f"permission denied: let this user use it, run as one who may, or {elsewhere}",
        errno.EPERM: f"not permitted: run as a user who may use it, or {elsewhere}",
        errno.EROFS: f"the file system is read-only: {elsewhere}",
        errno.EEXIST: f"a file is where this directory must be made: move it away, or {elsewhere}",
        errno.ENOTDIR: f"a file is where a directory must be made for it: move it away, or {elsewhere}",
        errno.ENAMETOOLONG: "the name is too long: give a shorter one",
        errno.EIO: f"the disk, or the network to it, fails (input/output error): mend that (dmesg may say more), {again}",
        errno.ESTALE: f"the network's file system has lost it (stale file handle): mount it anew, {again}",
        errno.ENOENT: f"it is not there, or not any more: bring it back, {again}",
        errno.EMFILE: f"this process has too many files open: allow more with ulimit -n 65536, {again}",
        errno.ENFILE: f"this machine has too many files open: end what holds them, {again}",
        errno.ENOMEM: f"no memory is left for it: end what else uses it, or lower data.workers, {again}",
    }
    remedy = remedies.get(error.errno or 0)
    if remedy is None and error.errno in LOST and error.filename:
        remedy = f"its file system does not answer ({(error.strerror or '').lower()}): mend that, {again}"
    return f"{error.filename or 'the run directory'}: {remedy}" if remedy else None
