"""`python -m tests.matrix` tries the wheel with the oldest and the newest PyTorch (`make matrix`).

For each, in an environment of its own: install, train the demo for an epoch, check and ask the
package. The oldest PyTorch runs on the oldest Python that is installed and supported, the newest on
the newest one. Needs a package index, 6 GB of disk for each (in TMPDIR), and minutes.
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import tomllib
from pathlib import Path

PROJECT = Path(__file__).parents[1]

OLDEST = "oldest"  # what pyproject.toml says works
NEWEST = "newest"  # what the index has
# Which torchvision goes with a PyTorch: 0.24 with 2.9, 0.25 with 2.10 (pytorch/vision's README).
VISION_AHEAD = 15


def requirements(which: str) -> list[str]:
    """Return what pip is to install of PyTorch: the oldest allowed minor version, or the newest."""
    if which == NEWEST:
        return ["torch", "torchvision"]
    project = tomllib.loads((PROJECT / "pyproject.toml").read_text())["project"]
    [minor] = [
        int(found[1])
        for each in project["dependencies"]
        if (found := re.fullmatch(r"torch>=2\.(\d+)", each))
    ]
    return [f"torch==2.{minor}.*", f"torchvision==0.{minor + VISION_AHEAD}.*"]


def interpreter(which: str) -> str:
    """Return the oldest or the newest Python here, of those that pyproject.toml allows."""
    project = tomllib.loads((PROJECT / "pyproject.toml").read_text())["project"]
    oldest = int(project["requires-python"].removeprefix(">=3."))
    found = filter(None, (shutil.which(f"python3.{minor}") for minor in range(oldest, 30)))
    # One of pyenv's is there for each version, and fails where that isn't chosen.
    runs = [
        python
        for python in found
        if subprocess.run([python, "-c", ""], capture_output=True).returncode == 0
    ]
    if not runs:
        return sys.executable
    return runs[0 if which == OLDEST else -1]


def main() -> None:
    """Build a wheel, and walk through it with each version."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("versions", nargs="*", default=[OLDEST, NEWEST], metavar="oldest|newest")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        place = Path(directory)
        run(PROJECT, sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps",
            "--wheel-dir", directory, copy_of_the_project(place / "source"))  # fmt: skip
        [wheel] = place.glob("packhorse-*.whl")
        for which in options.versions:
            began = time.monotonic()
            walk(place / which, wheel, interpreter(which), requirements(which))
            print(f"{which}: passed after {time.monotonic() - began:.0f} s", flush=True)


def copy_of_the_project(to: Path) -> Path:
    """Write what is committed into a folder: a build leaves files behind."""
    to.mkdir()
    archive = subprocess.run(
        ["git", "archive", "HEAD"], cwd=PROJECT, capture_output=True, check=True
    )
    subprocess.run(["tar", "-x", "-C", to], input=archive.stdout, check=True)
    return to


def walk(place: Path, wheel: Path, interpreter: str, pytorch: list[str]) -> None:
    """Install and use the wheel in an empty folder. Raise CalledProcessError where a step fails."""
    place.mkdir()
    run(place, interpreter, "-m", "venv", "environment")
    python = place / "environment/bin/python"
    run(place, python, "-m", "pip", "install", "--quiet", f"{wheel}[serve]", *pytorch)
    run(place, python, "-m", "trainer", "--version")
    run(place, python, "-m", "trainer", "train.epochs=1", "model=small_cnn", "name=demo")
    run(place, python, "-m", "serving", "check", "runs/demo/model.tar.gz")
    run(place, python, "-m", "serving", "predict", "newest", "data/fashion_mnist/test",
        "--csv", "labels.csv")  # fmt: skip


def run(place: Path, *command: str | Path) -> None:
    """Run a command there, without this checkout in its way."""
    print("+", *command, flush=True)
    kept = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    subprocess.run(command, cwd=place, env=kept, check=True)


if __name__ == "__main__":
    main()
