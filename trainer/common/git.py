"""The revision of the running code."""

import os
import subprocess

from trainer.common import sessions
from trainer.common.errors import PROJECT


def revision() -> str | None:
    """Return the code's git commit, with `-dirty` where files were changed; None if unknown.

    A rented machine has no checkout: there the launcher has set PACKHORSE_REVISION.
    """
    if known := os.environ.get("PACKHORSE_REVISION"):
        return known
    if not (PROJECT / "pyproject.toml").is_file():
        return None  # an installed package, whose folder may be inside another repository
    command = ["git", "-C", str(PROJECT), "describe"]
    command += ["--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        done = sessions.run(command, timeout=10)
        if done.returncode < 0:  # killed, for memory say: two packages of one run would differ
            done = sessions.run(command, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    if done.returncode != 0:
        return None
    return done.stdout.strip()
