"""Real runs, really killed. `make soak` does the same 200 times."""

import contextlib
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.conftest import QUICK, Process, run_trainer, start_trainer, wait_for
from tests.soak import KILLS, VARIANTS, Life, soak
from tests.soak import QUICK as SHORT
from trainer.common.errors import OK, RESUME
from trainer.images.datasets import materialize
from trainer.training import checkpoint


@pytest.mark.parametrize(
    ("kills", "variants"), [(2, SHORT), pytest.param(20, [*VARIANTS], marks=pytest.mark.long)]
)
def test_whatever_ends_a_run_it_comes_to_the_same_bits(tmp_path, monkeypatch, kills, variants):
    print(f"replay with: make soak KILLS={kills} SEED=0")
    monkeypatch.setattr(Life, "forked", True)
    tally = soak(kills, 0, tmp_path, variants, complete=variants != SHORT)
    assert not tally.failures, tally
    assert sum(tally.kills.values()) >= kills and set(tally.kills) <= set(KILLS)


@pytest.mark.parametrize(
    "delay", [0.4, *(pytest.param(delay, marks=pytest.mark.long) for delay in (0.0, 0.8, 1.2))]
)
def test_ctrl_c_while_pytorch_is_loaded_ends_the_run_in_order(tmp_path, delay):
    # A KeyboardInterrupt inside an import left NumPy half imported, and the run failed much later.
    process = start_trainer(tmp_path, forked=False)
    assert process.stdout is not None and process.stdout.readline().startswith(
        "run "
    )  # what follows is the import
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(delay)
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=600)
    assert process.returncode in (-signal.SIGINT, RESUME), output
    assert "Traceback" not in output


# --- asked to stop, politely: at a moment that is seen from outside ---

COMMAND = (
    "name=run",
    "platform.runs=runs",
    "platform.cache=cache",
    "train.epochs=2",
    "checkpoint.minutes=1e-4",
    "checkpoint.max_cost=1",
)


def stopped_when(
    cwd: Path,
    seen: Callable[[], bool],
    ask: Callable[[Process], None],
    *command: str,
    before: str = "",
    **environment: str,
) -> str:
    """Starts the trainer, asks it to stop as soon as `seen`, and returns what it printed. It must
    end within seconds, and say that it can go on.
    """
    process = start_trainer(cwd, *command, before=before, **environment)
    assert wait_for(lambda: seen() or process.poll() is not None)
    ask(process)
    output, _ = process.communicate(timeout=600)
    assert process.returncode == RESUME, output
    assert "start the same command again" in output.splitlines()[-1]
    return output


def terminate(process: Process) -> None:
    process.send_signal(signal.SIGTERM)


def goes_on_to_the_end(cwd: Path, *command: str, **environment: str) -> str:
    code, output = run_trainer(cwd, *command, **environment)
    assert code == OK, output
    return output


# Asks for the notice so often that a short run is long enough.
OFTEN = """
from trainer.common import interrupt
interrupt.on_spot_notice.__wrapped__.__defaults__ = (0.02,)
"""


def test_a_spot_notice_saves_and_the_next_start_goes_on(tmp_path, pictures, metadata):
    (tmp_path / "pictures").symlink_to(pictures)
    checkpoints = tmp_path / "runs/run/checkpoints"
    command = (
        *COMMAND, *QUICK, "data=folder", "data.root=pictures", "model=small_cnn", "platform=ec2",
        "platform.runs=runs", "platform.cache=cache", "train.epochs=40",
    )  # fmt: skip

    def reclaim(process):
        metadata.notices = frozenset({"spot/instance-action"})

    output = stopped_when(
        tmp_path, lambda: bool(checkpoint.steps(checkpoints)), reclaim, *command, before=OFTEN
    )
    assert "stopped by the spot interruption notice" in output
    checkpoint.verify(checkpoint.steps(checkpoints)[-1])
    metadata.notices = frozenset()
    assert "resumed from" in goes_on_to_the_end(tmp_path, *command)


# The second picture waits until the signal has come, so it falls into the packing, whatever the
# load. Each is noted.
SLOWLY = """
import time
from trainer.common.interrupt import Stop
from trainer.images import cache
asked, shrunk = [], open("shrunk", "a")
ask, shrink = Stop.ask, cache.shrink
def heard(self, reason):
    asked.append(reason)
    ask(self, reason)
def slowly(*arguments, **more):
    print(1, file=shrunk, flush=True)
    while shrunk.tell() > 2 and not asked:
        time.sleep(0.01)
    return shrink(*arguments, **more)
Stop.ask, cache.shrink = heard, slowly
"""


def test_sigterm_while_pictures_are_packed(tmp_path, pictures):
    pixels = tmp_path / "cache/pixels"
    command = (*COMMAND, *QUICK, "data=folder", f"data.root={pictures}", "model=small_cnn")
    output = stopped_when(
        tmp_path,
        lambda: any(path.stat().st_size for path in pixels.glob("*/*.pixels")),
        terminate,
        *command,
        "data.workers=0",
        before=SLOWLY,
    )
    assert "model:" in output and "metrics:" not in output
    packed = len((tmp_path / "shrunk").read_text().splitlines())
    assert packed < len(list(pictures.rglob("*.png"))), "the rest isn't packed first"
    goes_on_to_the_end(tmp_path, *command)


@pytest.mark.long
def test_sigterm_during_an_evaluation(tmp_path):
    materialize("fashion_mnist", tmp_path / "data")
    # Little to train on and much to evaluate. An epoch has 7 steps, and what is saved after the
    # last of them is saved during the evaluation.
    swapped = ("data.train=data/valid", "data.valid=data/train")
    command = (*COMMAND, "data=fashion_mnist", "data.root=data", *swapped)
    checkpoints = tmp_path / "runs/run/checkpoints"
    stopped_when(tmp_path, (checkpoints / "step-00000007").exists, terminate, *command)
    newest = checkpoint.newest(checkpoints)
    assert newest is not None and (
        newest[1]["progress"]["epoch"],
        newest[1]["progress"]["batch"],
    ) == (0, 7)
    goes_on_to_the_end(tmp_path, *command)
