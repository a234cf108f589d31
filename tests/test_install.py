"""What a text says of installing can be done: nobody publishes this project as a package."""

import re
import subprocess
import sys
import tomllib

import pytest

from tests.conftest import PROJECT
from trainer.common.errors import install_command

PROJECT_TABLE = tomllib.loads((PROJECT / "pyproject.toml").read_text())["project"]
EXTRAS = set(PROJECT_TABLE["optional-dependencies"])
KINDS = (
    "*.py",
    "*.yaml",
    "*.yml",
    "*.md",
    "*.sh",
    "*.html",
    "*.j2",
    "*Dockerfile",
    "Makefile",
    ".ci/*",
)


def texts() -> dict[str, str]:
    """Every text file of the project, by its path."""
    listed = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "--", *KINDS]
    paths = subprocess.run(listed, cwd=PROJECT, capture_output=True, text=True, check=True).stdout
    here = [path for path in paths.split("\n") if path and (PROJECT / path).is_file()]
    assert len(here) > 100
    return {path: (PROJECT / path).read_text() for path in here}


def test_no_text_installs_the_project_by_its_name():
    by_name = re.compile(rf"(?:pip3?|uv|pipx) (?:add|install)\b[^\n]*\b{PROJECT_TABLE['name']}\b")
    named_by = {path: by_name.findall(text) for path, text in texts().items()}
    assert not {path: lines for path, lines in named_by.items() if lines}


def test_every_extra_that_a_text_names_is_there():
    named = re.compile(
        r"""setup EXTRA=["']?([\w ]+)|install_command\(["'](\w+)|-e ["']?\.\[(\w+)\]"""
    )
    extras = set()
    for text in texts().values():
        extras |= {name for groups in named.findall(text) for name in " ".join(groups).split()}
    assert len(extras) > 5
    assert extras <= EXTRAS | {"train"}


# --- the two ways that the texts show ---


def test_make_setup_takes_one_extra_or_several():
    for extras in ("sweep", "timm audit"):
        made = subprocess.run(
            ["make", "--no-print-directory", "-n", "-B", "setup", f"EXTRA={extras}"],
            cwd=PROJECT, capture_output=True, text=True,
        )  # fmt: skip
        assert made.stdout.splitlines() == [f".ci/setup {extra}" for extra in extras.split()]


@pytest.mark.parametrize("asked", ["swep", "heic,swep"])  # several, as a job on EC2 asks for them
def test_an_extra_that_is_not_there_is_one_line_and_makes_nothing(tmp_path, asked):
    for name in ("pyproject.toml", "constraints.txt", ".ci/setup"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes((PROJECT / name).read_bytes())
    done = subprocess.run(
        ["bash", ".ci/setup", asked], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 2
    [line] = done.stderr.splitlines()
    assert line.startswith("EXTRA=swep is not allowed; allowed: train, ") and "sweep" in line
    assert not (tmp_path / ".venv").exists()


def test_pip_takes_an_extra_from_where_the_project_lies(tmp_path):
    pytest.importorskip("setuptools", minversion="77")
    for name in ("pyproject.toml", "README.md", *PROJECT_TABLE["license-files"]):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes((PROJECT / name).read_bytes())
    pip = [sys.executable, "-m", "pip", "install", "--disable-pip-version-check"]
    done = subprocess.run(
        [*pip, "--dry-run", "--no-deps", "--no-build-isolation", "-e", f"{tmp_path}[sweep]"],
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "Would install packhorse" in done.stdout and "does not provide" not in done.stderr


@pytest.mark.parametrize(
    ("missing", "extra", "use"),
    [
        ("timm", "timm", "from trainer.network.build import build; build('timm/resnet18', 3)"),
        (
            "torch.utils.tensorboard",
            "tensorboard",
            "from pathlib import Path; from trainer.training.tracking import TensorBoard as T; "
            "T(Path('x'))",
        ),
        ("boto3", "aws", "from launch.__main__ import run; run('status', [])"),
        ("boto3", "aws", "from serving.__main__ import run; run(['plan'])"),
        (
            "optuna",
            "sweep",
            "from types import SimpleNamespace as S; from pathlib import Path as P; "
            "from trainer.sweep.driver import make_ledger; make_ledger(P(), S(engine='optuna'))",
        ),
        ("cloudsplaining", "audit", "from launch.audit.policies import load_rule_sets as l; l()"),
    ],
)
def test_a_missing_package_is_said_with_the_command_that_brings_it(tmp_path, missing, extra, use):
    script = f"""
import sys
sys.modules[{missing!r}] = None
from trainer.common.errors import UserError
try:
    {use}
except UserError as error:
    print(error)
"""
    done = subprocess.run(
        [sys.executable, "-c", script],
        cwd=PROJECT,
        env={"PYTHONPATH": str(PROJECT), "HOME": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip().endswith(": " + install_command(extra)), done.stdout
