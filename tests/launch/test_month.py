"""A month of runs in a model of AWS (tests/launch/month.py): what must hold whatever happens."""

import pytest

from tests.launch.month import month


def check(figures: dict) -> None:
    assert figures["above their ceiling"] == 0
    assert figures["machines left"] == 0
    assert figures["longest time of two machines"] <= 60
    assert figures["longest time of two that work"] <= 30, "one had written its last word"
    assert figures["otherwise"] == 0, "complete, or ended by their ceiling"
    # In hindsight: a ceiling must hold for the highest price that may be billed, and for a machine
    # that ended when nobody looked.
    assert figures["of these it could have paid for"] <= 0.05 * figures["runs"]


def test_some_runs_of_a_month():
    figures = month(12, seed=7).figures()
    check(figures)
    assert figures["complete"] > 6 and figures["reclaims"] and figures["refusals"]


@pytest.mark.long
@pytest.mark.parametrize("seed", [0, 1])
def test_a_thousand_runs_of_a_month(seed):
    figures = month(1000, seed).figures()
    check(figures)
    for what in ("reclaims", "refusals", "calls without an answer", "dead laptops", "twins"):
        assert figures[what] > 50, figures
