"""Paths as people type them, and where things are found."""

import os
import re
import shlex
from pathlib import Path

from trainer.common.errors import UserError

ARCHIVE = "model.tar.gz"  # the model package, in a run's directory
RENTED = "rented.json"  # there: where a run on rented machines lies in S3, and what it cost


def expanded(path: str) -> str:
    """Return the path with `~`, `~user`, `$NAME` and `${NAME}` replaced, as a shell does.

    With a variable that isn't set, return the path as it is written if it exists; otherwise raise
    UserError, so that nobody makes a directory of that name.
    """
    home = os.path.expanduser(path)  # noqa: PTH111 (pathlib's raises where there is no such user)
    if home.startswith("~") and home == path:
        raise UserError(
            f"{path}: there is no user {path.split('/')[0][1:]}; "
            f"a path here that begins with ~ is ./{path}"
        )
    unset = [name for name in re.findall(r"\$\{?([A-Za-z_]\w*)", home) if name not in os.environ]
    if unset and not os.path.lexists(home):
        raise UserError(
            f"{path}: the environment variable {unset[0]} isn't set; set it (export "
            f"{shlex.quote(unset[0])}=...), or write the path out"
        )
    whole = os.path.expandvars(home)
    if "${" in whole:
        raise UserError(f"{path}: a path can't hold ${{; give another name")
    return whole


def user_cache() -> Path:
    """Return the directory of what may be deleted at any time, as in conf/platform/local.yaml."""
    return Path(os.environ.get("HOME", "/tmp"), ".cache", "packhorse")
