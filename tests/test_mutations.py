import subprocess
import sys

import pytest

from tests.mutations import MUTATIONS, PROJECT


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda mutation: mutation.fault)
def test_a_fault_has_its_place_and_its_test(mutation):
    assert (PROJECT / mutation.file).read_text().count(mutation.old) == 1
    path, *chosen = mutation.test.split(" ")
    tests = (PROJECT / "tests" / path).read_text()
    assert all(word in tests for word in chosen if word != "-k")


@pytest.mark.long
@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda mutation: mutation.fault)
def test_a_fault_is_noticed(mutation):
    command = [sys.executable, "-m", "tests.mutations", mutation.fault]
    done = subprocess.run(command, cwd=PROJECT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
