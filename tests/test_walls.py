"""What imports what (the design's walls), in a fresh process each."""

import subprocess
import sys

import pytest

from tests.conftest import PROJECT


def loaded_by(code: str) -> set[str]:
    """The top-level names of all modules that a process has loaded after running `code`."""
    script = f"import sys\n{code}\nprint('loaded', *{{name.split('.')[0] for name in sys.modules}})"
    done = subprocess.run(
        [sys.executable, "-P", "-c", script],
        cwd=PROJECT,
        env={"PYTHONPATH": str(PROJECT)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return set(done.stdout.rsplit("loaded", 1)[1].split())


def import_all(folder: str) -> str:
    modules = [
        path.relative_to(PROJECT).with_suffix("")
        for path in sorted((PROJECT / folder).rglob("*.py"))
    ]
    names = [".".join(path.parts).removesuffix(".__init__") for path in modules]
    return "import " + ", ".join(names)


def test_the_trainer_knows_directories_and_torch_only():
    assert loaded_by(import_all("trainer")).isdisjoint({"boto3", "botocore", "launch", "serving"})


def test_a_small_network_needs_no_torchvision_to_start():
    assert "torchvision" not in loaded_by(
        import_all("trainer") + "\nfrom trainer import model\nmodel.build('small_cnn', 3)"
    )


def test_the_first_step_needs_no_compiler():
    code = """
import torch
from trainer.network import device, build as model, optim
device.make_deterministic()
network = model.build("small_cnn", 3)
optimizer = optim.build(network, "adamw", lr=0.1, head_lr=None, weight_decay=0.1, momentum=0.9)
network(torch.zeros(2, 16, 16, 3)).sum().backward()
optimizer.step()
optimizer.zero_grad()
optimizer.state_dict()
"""
    assert loaded_by(code).isdisjoint({"torchvision", "sympy"})  # torch._dynamo brings SymPy


def test_serving_needs_neither_torch_nor_hydra():
    loaded = loaded_by(import_all("serving"))
    assert loaded.isdisjoint({"torch", "torchvision", "hydra", "omegaconf", "boto3"})
    assert "PIL" in loaded


def test_what_answers_requests_knows_nothing_of_deploying():
    """Only what runs on the user's machine (deploy/, and bench with its prices) takes `launch`'s seam to AWS."""
    modules = [
        f"serving.{path.stem}"
        for path in sorted((PROJECT / "serving").glob("*.py"))
        if path.stem not in ("__init__", "bench")
    ]
    assert "launch" not in loaded_by("import " + ", ".join(modules))
    assert "launch" not in loaded_by(import_all("serving/adapters"))


def test_launch_never_imports_torch():
    assert loaded_by(import_all("launch")).isdisjoint({"torch", "torchvision"})


@pytest.mark.parametrize(
    "module",
    [
        "trainer.settings.config",
        "trainer.common.errors",
        "trainer.images.datasets",
        "trainer.training.run",
        "trainer.common.interrupt",
    ],
)
def test_settings_and_folders_are_read_without_torch(module):
    assert "torch" not in loaded_by(f"import {module}")


def test_preprocessing_needs_pillow_and_numpy_only():
    assert (
        loaded_by("import trainer.images.decode") - set(sys.stdlib_module_names)
        <= {"PIL", "numpy", "trainer", "__main__"} | stray()
    )


def stray() -> set[str]:
    """What any Python here loads at its start (editable installs, for example)."""
    return loaded_by("pass") | {"cython_runtime", "_cython_3_2_1"}


def test_help_is_answered_without_torch():
    code = """
import runpy
sys.argv = ["trainer", "--help"]
try:
    runpy.run_module("trainer", run_name="__main__")
except SystemExit as end:
    assert not end.code, end.code
"""
    assert "torch" not in loaded_by(code)
