"""The revision that a run, a package and a job carry."""

import shutil
import subprocess
import sys

import pytest

from tests.conftest import PROJECT


@pytest.fixture
def checkout(tmp_path):
    """A repository with a commit, which holds what tells its revision."""
    for name in ("trainer/__init__.py", "pyproject.toml"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        shutil.copy(PROJECT / name, tmp_path / name)
    shutil.copytree(PROJECT / "trainer" / "common", tmp_path / "trainer" / "common")
    git(tmp_path, "init", "-q")
    git(tmp_path, "add", ".")
    git(tmp_path, "-c", "user.name=a", "-c", "user.email=a@b", "commit", "-qm", "first")
    return tmp_path


def git(folder, *arguments):
    done = subprocess.run(["git", *arguments], cwd=folder, check=True, capture_output=True)
    return done.stdout.decode().strip()


def revision(folder, **environment):
    code = "from trainer.common.git import revision; print(revision())"
    known = {"PATH": "/usr/bin:/bin", "PYTHONPATH": str(folder), "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run(
        [sys.executable, "-P", "-c", code],
        cwd="/",
        env=known | environment,
        capture_output=True,
        text=True,
    )
    return done.stdout.strip()


def test_a_changed_checkout_is_dirty(checkout):
    commit = git(checkout, "rev-parse", "HEAD")
    assert revision(checkout) == commit
    (checkout / "pyproject.toml").write_text("")
    assert revision(checkout) == f"{commit}-dirty"


def test_a_rented_machine_is_told(checkout):
    assert revision(checkout, PACKHORSE_REVISION="0123abc-dirty") == "0123abc-dirty"


def test_a_git_that_was_killed_is_asked_again(checkout, tmp_path_factory):
    folder = tmp_path_factory.mktemp("bin")
    killed = folder / "git"
    real = shutil.which("git")
    killed.write_text(
        f"#!/bin/sh\n[ -e {folder}/once ] || {{ touch {folder}/once; kill -9 $$; }}\n"
        f'exec {real} "$@"\n'
    )
    killed.chmod(0o755)
    commit = git(checkout, "rev-parse", "HEAD")
    assert revision(checkout, PATH=f"{folder}:/usr/bin:/bin") == commit


def test_an_installed_package_is_not_the_repository_that_it_lies_in(checkout):
    (checkout / "pyproject.toml").unlink()
    assert revision(checkout) == "None"
