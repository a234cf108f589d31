"""A few of the faults of `make faults`: each call to the system that fails costs no bit."""

import shutil
import subprocess
import sys

import pytest

from tests.conftest import PROJECT


@pytest.mark.long
@pytest.mark.skipif(
    sys.platform != "linux" or shutil.which("cc") is None,
    reason="LD_PRELOAD is Linux's, and what is loaded is compiled",
)
def test_whatever_call_fails_a_run_ends_with_the_same_bits():
    command = [sys.executable, "-m", "tests.faults", "--count", "24", "--seed", "7"]
    done = subprocess.run(command, cwd=PROJECT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
