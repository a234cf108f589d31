"""`train.compile=true` in real runs, with the compiler of this machine."""

import re
import shutil
from pathlib import Path

import pytest

from tests.conftest import QUICK, run_trainer
from tests.soak import difference, outcome
from trainer.common.errors import MISTAKE, OK
from trainer.training import checkpoint

COMPILED = (
    *QUICK, "name=run", "platform.cache=cache", "data=folder", "model=small_cnn",
    "train.compile=true",
)  # fmt: skip
EVERY_STEP = ("checkpoint.minutes=1e-4", "checkpoint.max_cost=1", "checkpoint.keep=99")


def need_compiler() -> None:
    if not (shutil.which("g++") or shutil.which("c++")):
        pytest.skip("torch.compile needs a C++ compiler, and the trainer tries it first")


@pytest.fixture(scope="module")
def code(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Where what is compiled is kept, so that each shape is compiled once for all tests."""
    need_compiler()
    return str(tmp_path_factory.mktemp("compiled"))


def forget_the_second_half(run: Path) -> None:
    """Leave what a power cut in the middle of the run would have left."""
    saved = checkpoint.steps(run / "checkpoints")
    for late in saved[max(1, len(saved) // 2) :]:
        shutil.rmtree(late)
    (run / "result.json").unlink()
    (run / "model.tar.gz").unlink()


SETTINGS = {
    "network": ["train.ema_decay=null", "model.unfreeze_epochs=1"],
    "average": ["train.ema_decay=0.9", "train.accumulate=2"],
    "head": ["model.freeze=backbone", "model.head_hidden=8"],
    "shards": ["model.freeze=backbone", "model.cached_views=null", "train.exact_shards=2"],
}
# PyTorch's compiler, but for the last step: the traced network is run as it is.
NO_CODE = """
import functools, torch
torch.compile = functools.partial(torch.compile, backend="eager")
"""


@pytest.mark.parametrize("kind", ["network", pytest.param("shards", marks=pytest.mark.long)])
def test_a_traced_run_trains_and_resumes_to_the_same_bits(tmp_path, pictures, kind):
    need_compiler()
    check(tmp_path, pictures, SETTINGS[kind], before=NO_CODE)


@pytest.mark.long
@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_a_compiled_run_trains_and_resumes_to_the_same_bits(tmp_path, pictures, code, settings):
    check(tmp_path, pictures, settings, TORCHINDUCTOR_CACHE_DIR=code)


def check(cwd: Path, pictures: Path, settings: list[str], **how: str) -> None:
    """Train, forget the second half, and go on. how: as `run_trainer` takes it."""
    command = (*COMPILED, f"data.root={pictures}", *EVERY_STEP, *settings)
    status, said = run_trainer(cwd, *command, **how)
    assert status == OK, said
    losses = [float(loss) for loss in re.findall(r" train_loss=(\S+)", said)]
    assert len(losses) == 2 and losses[1] < losses[0]

    run = cwd / "runs/run"
    expected = outcome(run)
    forget_the_second_half(run)
    status, said = run_trainer(cwd, *command, **how)
    assert status == OK and "resumed from" in said, said
    assert difference(expected, outcome(run)) is None


def test_without_a_compiler_one_line_says_so_before_any_picture_is_decoded(tmp_path, pictures):
    status, said = run_trainer(
        tmp_path,
        *COMPILED,
        f"data.root={pictures}",
        PATH=str(tmp_path),
        CXX="no-such-compiler",
        TORCHINDUCTOR_CACHE_DIR=str(tmp_path / "compiled"),
    )
    assert status == MISTAKE and "Traceback" not in said
    assert "train.compile=true" in said.splitlines()[-1] and "g++" in said.splitlines()[-1]
    assert not (tmp_path / "cache/pixels").exists()
