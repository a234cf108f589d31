"""Going on from a complete run: with more epochs, as a run of its own that names its parent."""

import json

import pytest

from tests.conftest import QUICK, make_pictures, run_trainer
from tests.soak import difference
from tests.trainer.trainings import make_loader, open_training, outcome
from trainer.common.errors import MISTAKE, OK, UserError
from trainer.training.loop import fit

RECIPE = ("model=small_cnn", "data.size=16", "data.resize=18", "train.batch_size=8", "seed=7")
CONSTANT = ("optim.schedule=constant", "optim.warmup_epochs=0.5", "optim.lr=3e-3")


@pytest.fixture
def trained(tmp_path, pictures, configure):
    """Trains below `tmp_path`; returns the training."""

    def trained(name, *words, of=pictures):
        config = configure(*RECIPE, *CONSTANT, *words)
        training = open_training(tmp_path / name, config, make_loader(of))
        fit(training)
        return training

    return trained


def test_more_epochs_are_the_run_that_had_them_from_the_start(trained, tmp_path):
    parent = trained("parent", "train.epochs=1")
    more = trained("more", "train.epochs=3", f"train.parent={tmp_path}/parent")
    whole = trained("whole", "train.epochs=3")
    both = outcome(more), outcome(whole)
    for each in both:
        del each["facts"]["identity"]  # names the parent
    assert difference(*both) is None
    identity = more.facts["identity"]
    assert identity["parent"] == more.run.parent_digest() is not None
    assert outcome(parent)["progress"]["epoch"] == 1  # stays what it was


def test_a_run_goes_on_when_its_parent_is_gone(trained, tmp_path):
    trained("parent", "train.epochs=1")
    words = ("train.epochs=2", f"train.parent={tmp_path}/parent")
    before = outcome(trained("more", *words))
    (tmp_path / "parent").rename(tmp_path / "elsewhere")
    assert difference(before["network"], outcome(trained("more", *words))["network"]) is None


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["train.epochs=1"], "has 1 epochs already, and train.epochs=1 is not more; raise it"),
        (["train.epochs=3", "train.ema_decay=0.5"], "other settings (train.ema_decay: 0.99 then, "),
        (["train.epochs=3", "train.parent=nowhere"], "train.parent=nowhere: it has no checkpoints"),
    ],
)
def test_what_is_no_going_on_is_refused(trained, tmp_path, words, line):
    trained("parent", "train.epochs=1")
    with pytest.raises(UserError) as error:
        trained("more", f"train.parent={tmp_path}/parent", *words)
    assert line in str(error.value)


def test_other_pictures_go_on_by_the_weights(trained, tmp_path):
    trained("parent", "train.epochs=1")
    others = make_pictures(tmp_path / "others", {"train": 9, "valid": 3, "test": 3})
    with pytest.raises(UserError, match=r"was trained on other pictures; model\.weights="):
        trained("more", f"train.parent={tmp_path}/parent", "train.epochs=2", of=others)


@pytest.mark.long
def test_the_result_and_the_report_name_the_parent(pictures, tmp_path):
    words = (*QUICK, "model=small_cnn", f"data.root={pictures}", "optim.lr=1e-3")
    assert run_trainer(tmp_path, *words, "train.epochs=1", "name=first")[0] == OK
    code, said = run_trainer(tmp_path, *words, "name=first")  # of two epochs
    assert code == MISTAKE and "train.parent=runs/first continues from its end" in said
    code, said = run_trainer(tmp_path, *words, "name=second", "train.parent=runs/first")
    assert code == OK and "continues from runs/first/checkpoints/step-" in said
    assert "epoch=1 " not in said and "epoch=2 " in said
    code, said = run_trainer(tmp_path, *words, "name=third", "model.weights=runs/second")
    assert code == OK, said
    for name, parent, what in (("second", "first", "state"), ("third", "second", "weights")):
        result = json.loads((tmp_path / "runs" / name / "result.json").read_text())
        assert (result["parent"]["run"], result["parent"]["what"]) == (f"runs/{parent}", what)
        assert len(result["parent"]["sha256"]) == 64
        assert f"runs/{parent}" in (tmp_path / "runs" / name / "report.html").read_text()
    assert "parent" not in json.loads((tmp_path / "runs/first/result.json").read_text())
