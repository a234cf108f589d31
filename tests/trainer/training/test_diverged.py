"""A loss that is no finite number: its first step is named, and a run may go back and on."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.trainer.trainings import SAVED_OFTEN, make_loader, make_network, open_training, outcome
from trainer.common.errors import Interrupted
from trainer.settings.config import Config
from trainer.training import checkpoint, loop
from trainer.training.loop import fit
from trainer.training.training import REWINDS, Diverged, Training

RUN = (
    "data=folder", "data.root=x", "model=small_cnn", "platform=local", "train.batch_size=8",
    "train.epochs=4", "train.threads=1", "optim.warmup_epochs=0", *SAVED_OFTEN,
)  # fmt: skip
BAD = 7  # the step, from 0, after which the weights are no numbers: the second of epoch 3's three


@pytest.fixture
def diverge(monkeypatch) -> Callable[[int], None]:
    """Makes the weights NaN after step BAD, as long as training went back fewer times than that."""
    real = loop.train_one_step

    def diverge(times: int) -> None:
        def step(run: Training, *batch: Any) -> None:
            real(run, *batch)
            if run.progress.step == BAD and len(run.progress.rewinds) < times:
                with torch.no_grad():
                    run.network.head.bias.fill_(math.nan)

        monkeypatch.setattr(loop, "train_one_step", step)

    return diverge


def open_run(root: Path, config: Config, pictures: Path) -> Training:
    return open_training(root, config, make_loader(pictures))


def result(training: Training) -> dict[str, Any]:
    return outcome(training) | {"rewinds": training.progress.rewinds}


def all_finite(path: Path) -> bool:
    state = checkpoint.load(path)
    return all(tensor.isfinite().all() for tensor in state["network"].values())


def test_the_first_bad_step_is_named_and_no_bad_weights_are_saved(
    tmp_path, pictures, configure, diverge
):
    diverge(9)
    training = open_run(tmp_path / "run", configure(*RUN), pictures)
    with pytest.raises(Diverged) as raised:
        fit(training)
    # Steps are saved, but not the one that broke the weights: the next one's loss tells.
    assert str(raised.value).startswith("the loss is nan in epoch 3, at step 9, with a learning ")
    assert "train.on_nan=rewind" in str(raised.value)
    batch = training.loader.epoch(2)[2]
    paths = training.loader.folder.splits["train"].paths
    assert paths[batch[0] % len(paths)] in str(raised.value)
    saved = checkpoint.steps(tmp_path / "run/checkpoints")
    assert saved[-1].name <= checkpoint.step_name(BAD, evaluated=False)
    assert all(map(all_finite, saved))


def test_a_run_goes_back_at_half_the_rate_and_any_interruption_gives_the_same_bits(
    tmp_path, pictures, configure, diverge
):
    diverge(REWINDS)
    config = configure(*RUN, "train.on_nan=rewind")
    whole = open_run(tmp_path / "whole", config, pictures)
    fit(whole)
    notes = whole.progress.rewinds
    assert [(note["epoch"], note["step"], note["loss"]) for note in notes] == [(3, 9, "nan")] * 2
    assert notes[1]["lr"] == notes[0]["lr"] / 2
    assert [row["epoch"] for row in whole.metrics_file.rows] == [1, 2, 3, 4]

    interrupted = 0
    training = open_run(tmp_path / "again", config, pictures)
    while interrupted < 40:
        # After each step, those that are done again too.
        real, left = training.end_step, [2]

        def end_step(training=training, real=real, left=left) -> None:
            left[0] -= 1
            if left[0] == 0:
                training.stop.ask("the test")
            real()

        training.end_step = end_step  # type: ignore[method-assign]
        try:
            fit(training)
            break
        except Interrupted:
            interrupted += 1
            training = open_run(tmp_path / "again", config, pictures)
    assert interrupted >= 6
    one, other = result(whole), result(training)
    assert one["rewinds"] == other["rewinds"] and one["rows"] == other["rows"]
    for part in ("network", "average"):
        for name, tensor in one[part].items():
            assert torch.equal(tensor, other[part][name]), name


def test_a_run_that_diverges_again_and_again_ends(tmp_path, pictures, configure, diverge):
    diverge(9)
    training = open_run(tmp_path / "run", configure(*RUN, "train.on_nan=rewind"), pictures)
    with pytest.raises(Diverged, match=r"epoch 3, at step 9") as raised:
        fit(training)
    assert len(training.progress.rewinds) == REWINDS and "on_nan" not in str(raised.value)
    # The next life knows how often it went back.
    training = open_run(tmp_path / "run", configure(*RUN, "train.on_nan=rewind"), pictures)
    assert len(training.progress.rewinds) == REWINDS


def test_a_run_whose_beginning_is_damaged_ends_as_without(tmp_path, pictures, configure, diverge):
    diverge(9)
    training = open_run(tmp_path / "run", configure(*RUN, "train.on_nan=rewind"), pictures)
    real = training.checkpoints.save_beginning

    def damaged(epoch: int) -> None:
        real(epoch)
        (file,) = (tmp_path / "run/checkpoints").glob("epoch-*/tensors.safetensors")
        file.write_bytes(file.read_bytes()[:-1])

    training.checkpoints.save_beginning = damaged  # type: ignore[method-assign]
    with pytest.raises(Diverged, match=r"epoch 3, at step 9"):
        fit(training)


def test_a_loss_of_valid_that_is_no_number_is_no_epoch(tmp_path, pictures, configure, monkeypatch):
    training = open_run(tmp_path / "run", configure(*RUN), pictures)
    evaluated = loop.evaluate

    def evaluate(run: Training) -> dict[str, float]:
        metrics = evaluated(run)
        if run.progress.epoch == 1:
            metrics["valid_loss"] = math.inf
        return metrics

    monkeypatch.setattr(loop, "evaluate", evaluate)
    with pytest.raises(Diverged, match=r"valid_loss is inf in epoch 2, at step 6"):
        fit(training)
    assert [row["epoch"] for row in training.metrics_file.rows] == [1]


def test_a_gradient_that_float16_can_not_hold_is_no_divergence(tmp_path, pictures, configure):
    config = configure(*RUN, "train.epochs=2")
    loader = make_loader(pictures)
    training = open_training(
        tmp_path / "run", config, loader, make_network(), precision=torch.float16
    )
    state = training.scaler.state_dict()
    training.scaler.load_state_dict(state | {"scale": 2.0**30})
    fit(training)
    assert training.progress.epoch == 2 and training.scaler.get_scale() < 2.0**30
