"""What a stranger and a release rely on: versions, the change log, GitHub's files, the lock."""

import datetime
import io
import re
import subprocess
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest
import yaml

import trainer
from tests import lock, matrix, release
from tests.conftest import PROJECT

KINDS = {"Added", "Changed", "Deprecated", "Removed", "Fixed", "Security"}


def test_the_changelog_has_the_form_of_keep_a_changelog():
    log = (PROJECT / "CHANGELOG.md").read_text()
    heads = re.findall(r"^## (.+)$", log, re.MULTILINE)
    assert heads[0] == "[Unreleased]"
    versions = [re.fullmatch(r"\[(\d+\.\d+\.\d+)\] - (\S+)", head) for head in heads[1:]]
    assert all(versions)
    numbers = [tuple(map(int, found[1].split("."))) for found in versions if found]
    assert numbers == sorted(numbers, reverse=True)
    dates = [datetime.date.fromisoformat(found[2]) for found in versions if found]
    assert dates == sorted(dates, reverse=True)
    kinds = re.findall(r"^### (\w+)", log, re.MULTILINE)
    assert kinds and set(kinds) <= KINDS


def test_the_version_stands_in_one_place():
    assert release.version_of(PROJECT) == trainer.__version__
    for name in ("pyproject.toml", "CITATION.cff", "Makefile", "README.md"):
        assert trainer.__version__ not in re.findall(
            r"\d+\.\d+\.\d+", (PROJECT / name).read_text()
        ), name


@pytest.mark.parametrize("package", ["trainer", "launch", "serving"])
def test_the_types_of_a_package_are_marked_and_packed(package):
    assert (PROJECT / package / "py.typed").is_file()
    project = tomllib.loads((PROJECT / "pyproject.toml").read_text())
    assert "py.typed" in project["tool"]["setuptools"]["package-data"][package]


def test_each_file_of_github_can_be_read_and_runs_what_there_is():
    files = [*PROJECT.glob(".github/**/*.yml"), PROJECT / ".pre-commit-config.yaml"]
    assert len(files) > 5
    for path in files:
        assert yaml.safe_load(path.read_text()), path
    assert yaml.safe_load((PROJECT / "CITATION.cff").read_text())["license"] == "MIT"
    weekly = yaml.safe_load((PROJECT / ".github/workflows/weekly.yml").read_text())
    for target in weekly["jobs"]["look"]["strategy"]["matrix"]["target"]:
        asked = subprocess.run(["make", "-n", target], cwd=PROJECT, capture_output=True)
        assert asked.returncode == 0, target
    steps = yaml.safe_load((PROJECT / ".github/workflows/ci.yml").read_text())["jobs"]["test"]
    assert {"run": ".ci/run"} in steps["steps"]


# --- the lock ---


def test_the_lock_has_the_versions_of_the_constraints_and_no_pytorch():
    def pins(name: str) -> dict[str, str]:
        found = lock.pins((PROJECT / name).read_text())
        return {re.sub(r"[-_.]+", "-", key).lower(): found[key] for key in found}

    locked, constraints = pins("requirements.lock"), pins("constraints.txt")
    differ = {
        name: version
        for name, version in locked.items()
        if constraints.get(name, version) != version
    }
    assert not differ, "make lock writes it anew"
    assert not {name for name in locked if lock.PYTORCH.match(f"{name}==")}
    project = tomllib.loads((PROJECT / "pyproject.toml").read_text())["project"]
    needed = [*project["dependencies"]]
    for extra in lock.EXTRAS:
        needed += project["optional-dependencies"][extra]
    names = {re.match(r"[\w-]+", each)[0].lower() for each in needed}
    assert names - {"torch", "torchvision"} <= set(locked), "make lock writes it anew"


def test_pytorch_and_what_comes_with_it_is_left_out_of_the_lock():
    resolved = (
        "torch==2.14.1 \\\n    --hash=sha256:aa\ntorchmetrics==1.9.0 \\\n    --hash=sha256:bb\n"
        "nvidia-nccl-cu13==2.30.7 \\\n    --hash=sha256:cc\n"
    )
    left = lock.without_pytorch(resolved)
    assert left == "torchmetrics==1.9.0 \\\n    --hash=sha256:bb\n"


# --- set-up, with stand-ins for python -m venv, pip and uv ---

PYTHON = """#!/bin/bash
if [ "$1 $2" = "-m venv" ]; then
  mkdir -p .venv/bin .venv/lib/python3.11/site-packages
  cp "$STAND_INS/pip" .venv/bin/pip
elif [ "$1" = -c ] && [[ "$2" == *"m.version('torch')"* ]]; then echo "$TORCH"
elif [ "$1" = -c ] && [[ "$2" == *"m.version('torchvision')"* ]]; then echo
elif [ "$1" = -c ] && [[ "$2" == *find_spec* ]]; then echo /opt/pytorch
elif [ "$1" = -c ]; then exit 0
fi
"""
PIP = """#!/bin/bash
if [ "$1 $2" = "config list" ]; then echo "$PIP_SETTINGS"; else echo "pip $*" >> calls; fi
"""
UV = """#!/bin/bash
echo "uv $*" >> calls
"""


def set_up(place: Path, torch: str = "", settings: str = "", hashes: str = "yes") -> str:
    """Run `.ci/setup train` there; return what was called of pip and uv."""
    for name in ("pyproject.toml", "constraints.txt", "requirements.lock", ".ci/setup"):
        (place / name).parent.mkdir(exist_ok=True)
        (place / name).write_bytes((PROJECT / name).read_bytes())
    stand_ins = place / "bin"
    stand_ins.mkdir()
    for name, script in {"python": PYTHON, "pip": PIP, "uv": UV}.items():
        (stand_ins / name).write_text(script)
        (stand_ins / name).chmod(0o755)
    done = subprocess.run(
        ["bash", ".ci/setup", "train"],
        cwd=place,
        env={
            "PATH": f"{stand_ins}:/usr/bin:/bin",
            "PYTHON": str(stand_ins / "python"),
            "STAND_INS": str(stand_ins),
            "TORCH": torch,
            "PIP_SETTINGS": settings,
            "HASHES": hashes,
        },
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("setting up: .venv with ")
    return (place / "calls").read_text()


def test_set_up_takes_uv_where_it_is_there(tmp_path):
    by_hash, rest = set_up(tmp_path).splitlines()
    assert by_hash.startswith("uv pip install --python .venv/bin/python ")
    assert by_hash.endswith("--require-hashes --no-deps -r requirements.lock")
    assert rest.startswith("uv pip install ") and rest.endswith("-e .[aws,serve]")


def test_set_up_never_replaces_the_machines_pytorch_and_leaves_it_to_pip(tmp_path):
    assert {line.split()[0] for line in set_up(tmp_path, torch="2.13.0").splitlines()} == {"pip"}
    kept = (tmp_path / ".venv/constraints.txt").read_text()
    assert re.findall(r"^torch(?:vision)?==.*", kept, re.MULTILINE) == ["torch==2.13.0"]


def test_set_up_heeds_pips_own_index_and_the_wish_for_no_hashes(tmp_path):
    [call] = set_up(
        tmp_path, settings="global.index-url='https://pypi.example'", hashes="no"
    ).splitlines()
    assert call.startswith("pip install ") and "--require-hashes" not in call


# --- the oldest and the newest ---


def test_the_oldest_and_the_newest_python_are_those_that_run_here(tmp_path, monkeypatch):
    for minor, code in ((10, 0), (11, 127), (12, 0), (13, 0), (14, 127)):
        python = tmp_path / f"python3.{minor}"
        python.write_text(f"#!/bin/sh\nexit {code}\n")
        python.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert matrix.interpreter(matrix.OLDEST) == str(tmp_path / "python3.12")
    assert matrix.interpreter(matrix.NEWEST) == str(tmp_path / "python3.13")


# --- a release ---


def archive_of(names: list[str], when: int, owner: int) -> bytes:
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w:gz") as archive:
        for name in names:
            member = tarfile.TarInfo(name)
            member.mtime, member.uid, member.uname, member.size = when, owner, f"user{owner}", 3
            member.mode = 0o600 if owner else 0o644
            archive.addfile(member, io.BytesIO(b"abc"))
    return packed.getvalue()


def test_a_source_archive_is_the_same_whenever_wherever_and_by_whom_it_is_built():
    one = release.same_time(archive_of(["a", "b"], 1, 0), 1_700_000_000)
    other = release.same_time(archive_of(["b", "a"], 99, 1000), 1_700_000_000)
    assert one == other
    with tarfile.open(fileobj=io.BytesIO(one)) as archive:
        members = [(each.name, each.mtime, each.uname) for each in archive.getmembers()]
        assert members == [("a", 1_700_000_000, ""), ("b", 1_700_000_000, "")]


def wheel_of(mode: int) -> bytes:
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w") as wheel:
        for name, bits in (("trainer/cli.py", mode), ("data/setup", mode | 0o100)):
            member = zipfile.ZipInfo(name, (2026, 11, 26, 0, 0, 0))
            member.external_attr = (0o100000 | bits) << 16
            wheel.writestr(member, b"abc")
    return packed.getvalue()


def test_a_wheel_is_the_same_with_any_umask():
    one, other = (release.same_modes(wheel_of(mode)) for mode in (0o644, 0o600))
    assert one == other
    with zipfile.ZipFile(io.BytesIO(one)) as wheel:
        assert [member.external_attr >> 16 & 0o777 for member in wheel.infolist()] == [0o644, 0o755]


def test_a_release_without_a_dated_section_is_refused(monkeypatch):
    monkeypatch.setattr(release, "git", lambda *words: "")
    assert release.what_is_missing(trainer.__version__) == []
    assert release.what_is_missing("9.9.9") == ["CHANGELOG.md has no section [9.9.9] with a date"]
