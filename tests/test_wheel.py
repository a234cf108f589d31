"""What `pip install .` installs is enough: it trains and serves from an empty directory."""

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import urllib.request
from pathlib import Path

import pytest

from tests.conftest import PROJECT
from trainer.common.errors import OK

pytestmark = pytest.mark.long  # builds a wheel, makes an environment, and trains the demo


class Installed:
    """An environment with the wheel in it, and an empty directory beside the environment."""

    def __init__(self, root: Path) -> None:
        self.python = root / "environment/bin/python"
        self.place = root / "empty"
        self.place.mkdir()
        without = ("PYTHONPATH", "VIRTUAL_ENV", "AWS_")
        kept = {name: value for name, value in os.environ.items() if not name.startswith(without)}
        self.environment = kept | {"HOME": str(root), "OMP_NUM_THREADS": "1"}

    def start(self, *words: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [self.python, *words],
            cwd=self.place,
            env=self.environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def run(self, *words: str) -> str:
        process = self.start(*words)
        output, _ = process.communicate(timeout=600)
        assert process.returncode == OK, output
        return output


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Installed:
    pytest.importorskip("setuptools", minversion="77")
    root = tmp_path_factory.mktemp("wheel")
    # Built from a copy of what is tracked: a build leaves folders behind.
    listed = subprocess.check_output(["git", "ls-files"], cwd=PROJECT, text=True).splitlines()
    for path in (path for path in listed if (PROJECT / path).is_file()):
        (root / "source" / path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(PROJECT / path, root / "source" / path)
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet"]
    build = ["wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", root, root / "source"]
    subprocess.run([*pip, *build], check=True)
    [wheel] = root.glob("packhorse-*.whl")

    environment = root / "environment"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", environment], check=True)
    install = ["--python", environment / "bin/python", "install", "--no-deps", "--no-index", wheel]
    subprocess.run([*pip, *install], check=True)
    # The other packages are this environment's. A path that a .pth file names is looked through
    # last, and its own .pth files, of which one leads to this checkout, are not read.
    [packages] = environment.glob("lib/python3*/site-packages")
    (packages / "others.pth").write_text(sysconfig.get_path("purelib"))
    shutil.rmtree(root / "source")
    return Installed(root)


@pytest.fixture(scope="module")
def trained(installed: Installed) -> Installed:
    installed.run("-m", "trainer", "train.epochs=1", "name=demo", "model=small_cnn")
    return installed


@pytest.mark.parametrize("program", ["trainer", "launch", "serving", "conf"])
def test_the_installed_package_is_what_is_tried(installed, program):
    spec = (
        f"import importlib.util as u; print(*u.find_spec({program!r}).submodule_search_locations)"
    )
    place = Path(installed.run("-c", spec).strip())
    assert place.is_relative_to(installed.python.parents[1])


def test_it_trains_the_demo(trained):
    made = {path.name for path in (trained.place / "runs/demo").iterdir()}
    assert {"model.tar.gz", "result.json", "metrics.jsonl"} <= made


def test_it_serves_what_it_trained(trained):
    server = trained.start("-m", "serving", "serve", "--port", "0")
    try:
        assert server.stdout is not None
        lines = iter(server.stdout.readline, "")
        address = next(line for line in lines if "running on http://" in line)
        url = re.search(r"http://[\d.]+:\d+", address)[0]
        image = next((trained.place / "data").rglob("*.png")).read_bytes()
        request = urllib.request.Request(
            f"{url}/invocations", image, {"Content-Type": "image/png"}, method="POST"
        )
        with urllib.request.urlopen(request, timeout=60) as answer:
            assert answer.status == 200 and answer.read()
    finally:
        server.terminate()
        server.communicate(timeout=60)
