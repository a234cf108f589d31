"""What the machine lacks is named, with who needs it and how to get it."""

import pytest

from trainer.common import programs


@pytest.fixture
def path(tmp_path, monkeypatch):
    """A folder that is all of PATH."""
    monkeypatch.setenv("PATH", str(tmp_path))
    return tmp_path


def test_every_program_that_is_missing_is_named_with_who_needs_it(path):
    told = programs.missing()
    assert {"gcc", "session-manager-plugin", "chromium", "java"} <= set(told)
    assert told["gcc"].startswith("missing: make rehearse needs it (apt-get install gcc")


def test_another_program_of_the_kind_will_do(path):
    (path / "clang").write_text("#!/bin/sh\n")
    (path / "clang").chmod(0o755)
    assert "gcc" not in programs.missing()
