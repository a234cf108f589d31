"""A run that hangs saves what it can, says where it hangs, and ends with 75."""

import os
import shutil
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.conftest import make_pictures, run_trainer, start_trainer, wait_for
from tests.soak import difference, outcome
from tests.trainer import trainings
from tests.trainer.distributed.together import all_ended, together
from trainer.common.errors import OK, RESUME
from trainer.images.loader import Batch
from trainer.training import checkpoint, loop
from trainer.training.training import Training

SMALL = (
    "data=folder", "data.root=x", "model=small_cnn", "platform=local", "train.batch_size=8",
    "train.epochs=3", "train.threads=1", "optim.warmup_epochs=0",
)  # fmt: skip


def rescued(training: Training) -> bool:
    """What a thread beside the main one says, which hangs meanwhile."""
    answers: list[bool] = []
    thread = threading.Thread(target=lambda: answers.append(training.rescue()))
    thread.start()
    thread.join()
    return answers[0]


class Hangs(Exception):
    """The end of a life, when its hanging main thread was looked at."""


class Hanging:
    """Batches of which one never comes: number `at` of the named kind, counted over all epochs."""

    def __init__(self, training: Training, kind: str, at: int) -> None:
        self._data, self._training, self._kind, self._left = training.data, training, kind, at
        self.saved: bool | None = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self._data, name)

    def train_batches(self, epoch: int, first: int = 0) -> Iterator[Batch]:
        yield from self._counted("train", self._data.train_batches(epoch, first))

    def eval_batches(self, name: str) -> Iterator[Batch]:
        yield from self._counted("eval", self._data.eval_batches(name))

    def _counted(self, kind: str, batches: Iterator[Batch]) -> Iterator[Batch]:
        for batch in batches:
            self._left -= kind == self._kind
            if self._left == 0:
                self.saved = rescued(self._training)
                self._training._changing = threading.Lock()  # this process unwinds, and goes on
                raise Hangs
            yield batch


@pytest.mark.parametrize(("kind", "at", "name"), [("train", 5, "step-00000004"),
                                                  ("eval", 3, "step-00000006")])  # fmt: skip
def test_what_hangs_between_two_steps_is_saved_to_the_same_bits(
    tmp_path, pictures, configure, kind, at, name
):
    def begin(name: str) -> Training:
        config = configure(*SMALL)
        return trainings.open_training(tmp_path / name, config, trainings.make_loader(pictures))

    whole, training = begin("whole"), begin("run")
    loop.fit(whole)
    hanging = Hanging(training, kind, at)
    training.data = hanging  # type: ignore[assignment]
    with pytest.raises(Hangs):
        loop.fit(training)
    assert hanging.saved
    assert checkpoint.steps(tmp_path / "run/checkpoints")[-1].name == name
    again = begin("run")
    loop.fit(again)
    one, other = trainings.outcome(whole), trainings.outcome(again)
    assert one["rows"] == other["rows"]
    for key, tensor in one["network"].items():
        assert torch.equal(tensor, other["network"][key]), key


def test_what_hangs_within_a_step_is_not_saved(tmp_path, pictures, configure, monkeypatch):
    def step(run: Training, *batch: torch.Tensor) -> None:
        assert not rescued(run)  # who knows what it has changed
        raise Hangs

    monkeypatch.setattr(loop, "train_one_step", step)
    loader = trainings.make_loader(pictures)
    training = trainings.open_training(tmp_path / "run", configure(*SMALL), loader)
    with pytest.raises(Hangs):
        loop.fit(training)
    assert checkpoint.steps(tmp_path / "run/checkpoints") == []


# --- real processes, which really hang ---

LIMIT = 20  # train.stall_seconds: longer than a step takes on a busy machine
SHORT = "train.stall_seconds=20"
RUN = (
    "name=run", "platform=local", "platform.cache=cache",
    "data=folder", "data.root=pictures", "data.cache=none", "model=small_cnn",
    "data.size=16", "data.resize=16", "train.batch_size=8", "train.threads=1",
    "checkpoint.minutes=1e-4", "checkpoint.max_cost=1",
)  # fmt: skip


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("undisturbed")
    make_pictures(directory / "pictures", {"train": 16, "valid": 3, "test": 3})
    code, output = run_trainer(directory, *RUN, "train.epochs=60")
    assert code == OK, output
    return directory


@pytest.mark.long
@pytest.mark.parametrize("workers", [0, 2])
def test_a_picture_whose_disk_no_longer_answers_ends_the_run_which_goes_on(
    tmp_path, undisturbed, workers
):
    shutil.copytree(undisturbed / "pictures", tmp_path / "pictures")
    words = (*RUN, "train.epochs=60", SHORT, f"data.workers={workers}")
    process = start_trainer(tmp_path, *words)
    checkpoints = tmp_path / "runs/run/checkpoints"
    assert wait_for(lambda: checkpoint.steps(checkpoints) or process.poll() is not None)
    picture = tmp_path / "pictures/train/circle/003.png"
    content = picture.read_bytes()
    picture.unlink()
    os.mkfifo(picture)  # to open it waits for somebody who writes
    output, _ = process.communicate(timeout=600)
    assert process.returncode == RESUME, output
    assert "stopped: no progress for 20 s (train.stall_seconds)" in output
    assert "everything is saved" in output
    log = (tmp_path / "runs/run/log.txt").read_text()
    assert "trainer/images/folder.py" in log and "Traceback" not in output
    picture.unlink()
    picture.write_bytes(content)
    code, output = run_trainer(tmp_path, *words)
    assert code == OK and "resumed from" in output, output
    runs = [outcome(place / "runs/run") for place in (tmp_path, undisturbed)]
    assert difference(*runs) is None


@pytest.mark.long
def test_a_machine_that_sleeps_loses_nothing(tmp_path, undisturbed):
    (tmp_path / "pictures").symlink_to(undisturbed / "pictures")
    process = start_trainer(tmp_path, *RUN, "train.epochs=60", SHORT)
    checkpoints = tmp_path / "runs/run/checkpoints"
    assert wait_for(lambda: checkpoint.steps(checkpoints) or process.poll() is not None)
    os.killpg(process.pid, signal.SIGSTOP)
    time.sleep(1.5 * LIMIT)
    os.killpg(process.pid, signal.SIGCONT)
    output, _ = process.communicate(timeout=600)
    assert process.returncode == OK and "no progress" not in output, output
    assert difference(*[outcome(place / "runs/run") for place in (tmp_path, undisturbed)]) is None


@pytest.mark.long
def test_of_several_processes_the_one_that_hangs_says_where(tmp_path, undisturbed):
    other = tmp_path / "other"
    other.mkdir()
    (tmp_path / "pictures").symlink_to(undisturbed / "pictures")
    shutil.copytree(undisturbed / "pictures", other / "pictures")
    words = (*RUN, "train.epochs=6000", SHORT, "data.workers=1")
    checkpoints = tmp_path / "runs/run/checkpoints"
    with together([tmp_path, other], "trainer", *words) as processes:
        assert wait_for(lambda: checkpoint.steps(checkpoints) or processes[0].poll() is not None)
        for picture in (other / "pictures/train").rglob("*.png"):
            picture.unlink()
            os.mkfifo(picture)
        codes, outputs = all_ended(processes, 600)
    assert codes == [RESUME] * 2, outputs
    assert "trainer/images/folder.py" in outputs[1], outputs
    assert "continue from the newest checkpoint" in "".join(outputs)  # both see it: one says so
    checkpoint.verify(checkpoint.steps(checkpoints)[-1])
