"""What the tests of a driver share."""

import shutil
from pathlib import Path

import pytest

from tests.conftest import PROJECT, make_pictures


@pytest.fixture
def cwd(tmp_path):
    """A working directory in whose project the trainer is `trial.py`."""
    make_pictures(tmp_path / "pictures", {"train": 2, "valid": 1})
    project = tmp_path / "project"
    shutil.copytree(PROJECT / "conf", project / "conf")
    for name in ("trainer", "serving"):
        (project / name).mkdir(parents=True)
        (project / name / "__init__.py").touch()
    shutil.copy(Path(__file__).with_name("trial.py"), project / "trainer/__main__.py")
    return tmp_path
