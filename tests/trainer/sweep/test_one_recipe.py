"""A sweep over model=auto: what the first trial decides, the others follow where it is the same."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from trainer.sweep.driver import Driver, head_only
from trainer.training.recipe import FILE


def driver(directory: Path, decides_once: bool) -> Any:
    """One that has started nothing; each trial that it takes gets what was decided."""
    made: Any = object.__new__(Driver)
    made.directory, made.decides_once, made.jobs = directory, decides_once, []
    made.sweep = SimpleNamespace(together=1)
    left = [SimpleNamespace(number=number) for number in range(3)]

    def take() -> Any:
        if not left:
            return None
        trial = left.pop(0)
        made.place(trial).mkdir()
        made.hand_on(made.place(trial))
        return trial, False

    made.take = take
    return made


def written(directory: Path, number: int) -> Path:
    return directory / f"{number:04d}" / "checkpoints" / FILE


def test_the_others_wait_for_the_first_and_follow_it(tmp_path):
    made = driver(tmp_path, decides_once=True)
    made.jobs = made.next_trials()
    assert len(made.jobs) == 1 and made.next_trials() == [], "it hasn't decided yet"
    first = written(tmp_path, 0)
    first.parent.mkdir()
    first.write_text("what was decided")
    assert [trial.number for trial in made.next_trials()] == [1]
    assert written(tmp_path, 1).read_text() == "what was decided"


def test_a_trial_keeps_what_it_has_decided(tmp_path):
    made = driver(tmp_path, decides_once=True)
    for number, text in ((0, "first"), (1, "its own")):
        written(tmp_path, number).parent.mkdir(parents=True)
        written(tmp_path, number).write_text(text)
    made.hand_on(tmp_path / "0001")
    assert written(tmp_path, 1).read_text() == "its own"


def test_trials_that_may_differ_decide_for_themselves(tmp_path):
    made = driver(tmp_path, decides_once=False)
    made.jobs = made.next_trials()
    written(tmp_path, 0).parent.mkdir()
    written(tmp_path, 0).write_text("of the first")
    assert [trial.number for trial in made.next_trials()] == [1]
    assert not written(tmp_path, 1).exists()


@pytest.mark.parametrize(("model", "batched"), [("auto", False), ("name=resnet18", True)])
def test_what_has_to_be_decided_is_no_head_that_is_trained_in_a_batch(configure, model, batched):
    word = f"model={model}" if model == "auto" else f"model.{model}"
    assert head_only(configure("data.root=/nowhere", word, "model.freeze=backbone")) == batched
