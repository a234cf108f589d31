"""The page of a sweep: values as people write them, and a best that shares its hue with none."""

import re

import pytest

from tests.trainer.results.test_report import Page as Read
from trainer.results.charts import scale, share_axis
from trainer.settings.search_space import Categorical, Sweep
from trainer.sweep import page
from trainer.sweep.ledger import COMPLETE, Trial


@pytest.fixture(scope="module")
def shown(tmp_path_factory):
    values = [31 / 37, 31 / 37, 28 / 37, 31 / 37]
    trials = [
        Trial(number, {"optim.lr": 10.0**-number, "optim.name": name}, COMPLETE, value)
        for number, (name, value) in enumerate(zip(("a", "b", "a", "b"), values, strict=True))
    ]
    space = (
        Categorical("optim.lr", tuple(10.0**-number for number in range(4))),
        Categorical("optim.name", ("a", "b")),
    )
    sweep = Sweep("grid", "valid_top1", 4, 1, 1, "tpe", "none", 3, 0, space)
    rows = {
        trial.number: [
            {"epoch": 1, "valid_top1": 0.5},
            {"epoch": 2, "valid_top1": trial.value},
        ]
        for trial in trials
    }
    ranked = sorted(trials, key=lambda trial: -trial.value)
    path = tmp_path_factory.mktemp("sweep") / "sweep.html"
    page.write(page.Page("lr", sweep, ranked, ranked[0], rows, "again", {}), path)
    return path.read_text()


def test_shares_are_in_percent_and_ties_are_said(shown):
    text = Read(shown).text
    assert "83.8%" in text and "75.7%" in text and "0.8378" not in text
    assert "2 more are exactly as good: trial 1, 3." in text


def test_the_best_has_a_hue_of_its_own(shown):
    """The others go from blue to a grey."""
    for best, poor in zip(
        re.findall(r"--best: #(\w{6})", shown), re.findall(r"--poor: #(\w{6})", shown), strict=True
    ):
        red, _, blue = (int(best[place : place + 2], 16) for place in (0, 2, 4))
        assert red > 2 * blue - 60
        parts = [int(poor[place : place + 2], 16) for place in (0, 2, 4)]
        assert max(parts) - min(parts) < 30


@pytest.mark.parametrize(
    ("low", "high"), [(0.07, 0.98), (0.757, 0.838), (1, 3), (0, 1), (81, 99), (0.4999, 0.5001)]
)
def test_an_axis_has_three_ticks_at_least(low, high):
    assert len(scale("", low, high, log=False).ticks) >= 3
    if high <= 1:
        axis = share_axis("", [low, high])
        assert len(axis.ticks) >= 3 and axis.low >= 0 and axis.high <= 1
        assert all(label.endswith("%") for _, label in axis.ticks)
