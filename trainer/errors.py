"""What a run tells the shell: its exit codes, and one line for each mistake that a user can mend."""

import errno
import shlex
import sys
from pathlib import Path

PROJECT = Path(__file__).parents[1]

OK = 0
FAULT = 1  # a fault of ours: the traceback is shown
MISTAKE = 2  # the user's input or machine: one line says what, where and what to do
RESUME = 75  # EX_TEMPFAIL of sysexits.h: interrupted and saved; the same command goes on


class UserError(ValueError):
    """Something the user can mend. Its message says what is wrong, where, and what to do, in one line."""


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
    elsewhere = "choose another directory with platform.runs=DIR, platform.cache=DIR or data.root=DIR, whichever it lies in"
    remedies = {
        errno.ENOSPC: f"no space is left: free some, or {elsewhere}",
        errno.EDQUOT: f"the disk quota is used up: free some, or {elsewhere}",
        errno.EACCES: f"permission denied: run as a user who may use it, or {elsewhere}",
        errno.EPERM: f"not permitted: run as a user who may use it, or {elsewhere}",
        errno.EROFS: f"the file system is read-only: {elsewhere}",
        errno.EEXIST: f"a file is where this directory must be made: move it away, or {elsewhere}",
        errno.ENOTDIR: f"a file is where a directory must be made for it: move it away, or {elsewhere}",
        errno.ENAMETOOLONG: "the name is too long: give a shorter one",
    }
    remedy = remedies.get(error.errno or 0)
    return f"{error.filename or 'the run directory'}: {remedy}" if remedy else None
