"""Two machines that share a run's directory on a file system without locks."""

import os
import signal

import pytest

from tests.conftest import ended, run_trainer, start_trainer, wait_for
from tests.trainer.common.test_streams import RUN, check_equal
from tests.trainer.common.test_streams import cwd as cwd
from tests.trainer.common.test_streams import undisturbed as undisturbed
from trainer.common.errors import MISTAKE, OK

# What is tested lies between processes, so another name and boot make another machine of each.
MACHINE = """
import errno, fcntl, os, pathlib, socket, time
from trainer.common import owner

def flock(*arguments):
    raise OSError(errno.ENOSYS, "Function not implemented")

fcntl.flock = flock
name = os.environ["MACHINE"]
socket.gethostname = lambda: name
owner.RENEW_EVERY, owner.DEAD_AFTER = 0.1, float(os.environ["DEAD_AFTER"])
if name == "first":
    from trainer.results import outcome
    test = outcome.test

    def late(run):
        pathlib.Path("trained").touch()
        time.sleep(1e6)

    outcome.test = late
"""


@pytest.mark.long
def test_the_second_is_told_and_takes_over_once_the_first_is_dead(cwd, undisturbed):
    def on(machine: str, dead_after: float) -> dict[str, str]:
        return {"before": MACHINE, "MACHINE": machine, "DEAD_AFTER": str(dead_after)}

    first = start_trainer(cwd, *RUN, **on("first", 1e9))
    assert wait_for((cwd / "trained").exists)
    code, output = run_trainer(cwd, *RUN, **on("second", 1e9))
    assert code == MISTAKE and "Traceback" not in output, output
    assert (
        f"runs/run: another process trains in this run (process {first.pid} on first)"
        in output.splitlines()[-1]
    )
    os.killpg(first.pid, signal.SIGKILL)
    ended(first)
    code, output = run_trainer(cwd, *RUN, **on("second", 0.5))
    assert code == OK and "on first) is still alive" in output and "resumed from" in output, output
    check_equal(cwd, undisturbed)
    assert not list((cwd / "runs").rglob("*-owner*"))
