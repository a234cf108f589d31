"""What the endpoint's container holds: enough to check a package and to answer. Without Docker."""

import io
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from serving.deploy import image
from serving.deploy.release import Place
from tests.conftest import PROJECT
from trainer.common.errors import OK

DOCKERFILE = (PROJECT / "serving/Dockerfile").read_text()
# Of the trainer's own packages, those that the container does without, as they are imported.
LEFT_OUT = (
    "hydra", "jinja2", "omegaconf", "onnx", "onnxscript", "safetensors", "torch", "torchmetrics",
    "torchvision", "tqdm",
)  # fmt: skip


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that CodeBuild unpacks, and nothing beside it."""
    root = tmp_path_factory.mktemp("source")
    content = image.recipe(Place("n", "packhorse", "bucket"), "onnx").source.content
    assert isinstance(content, bytes)
    zipfile.ZipFile(io.BytesIO(content)).extractall(root)
    return root


@pytest.fixture(scope="module")
def container(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of code, as the COPY lines make it from what CodeBuild unpacks."""
    root = tmp_path_factory.mktemp("container")
    for line in re.findall(r"^COPY (.*)$", DOCKERFILE, re.MULTILINE):
        *sources, to = line.split()
        (root / to).mkdir(parents=True, exist_ok=True)
        for each in sources:
            if each.endswith("/"):
                shutil.copytree(source / each, root / to, dirs_exist_ok=True)
                continue
            files = list(source.glob(each))
            assert files, f"COPY {each}: there is no such file"
            for file in files:
                shutil.copy(file, root / to)
    return root


def test_the_source_has_what_is_copied_and_nothing_else(source, container):
    """A COPY of a file that is not there fails in Docker, and so does the fixture above."""

    def below(folder: Path) -> set[str]:
        return {str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file()}

    assert below(source) - below(container) == {"serving/Dockerfile"}
    # What the project's git knows or would take, and no cache of this machine's.
    git = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    known = subprocess.run(git, cwd=PROJECT, capture_output=True, text=True, check=True).stdout
    assert below(source) <= set(known.split())


def test_no_package_is_left_out_that_pip_installs_there():
    installed = re.search(r"^RUN pip install (.*)$", DOCKERFILE, re.MULTILINE)
    assert installed is not None
    assert not set(LEFT_OUT) & set(installed[1].split())


@pytest.mark.parametrize(
    "work",
    [
        "runpy.run_module('serving', run_name='__main__')",
        "import serving.server, serving.adapters.lambda_inside",
    ],
)
def test_its_code_checks_a_package_and_answers(container, original, work):
    script = f"""
import runpy, sys
for name in {LEFT_OUT}:
    sys.modules[name] = None
sys.argv = ["serving", "check", {str(original / "package")!r}]
{work}
"""
    done = subprocess.run(
        [sys.executable, "-P", "-c", script],
        cwd=container,
        env={"PYTHONPATH": str(container), "PYTHONDONTWRITEBYTECODE": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == OK, done.stdout + done.stderr
