"""What the endpoint's container holds: enough to check a package and to answer. Without Docker."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import PROJECT
from trainer.common.errors import OK

DOCKERFILE = (PROJECT / "serving/Dockerfile").read_text()
# Of the trainer's own packages, those that the container does without, as they are imported.
LEFT_OUT = (
    "hydra", "jinja2", "omegaconf", "onnx", "onnxscript", "safetensors", "torch", "torchmetrics",
    "torchvision", "tqdm",
)  # fmt: skip


@pytest.fixture(scope="module")
def container(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of code, as the COPY lines make it."""
    root = tmp_path_factory.mktemp("container")
    for line in re.findall(r"^COPY (.*)$", DOCKERFILE, re.MULTILINE):
        *sources, to = line.split()
        (root / to).mkdir(parents=True, exist_ok=True)
        for source in sources:
            if source.endswith("/"):
                shutil.copytree(PROJECT / source, root / to, dirs_exist_ok=True)
            else:
                shutil.copy(PROJECT / source, root / to)
    return root


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
