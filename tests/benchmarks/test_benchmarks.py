"""That the benchmarks' tables come out. They themselves take minutes and are `make bench`."""

import importlib

import pytest

from tests.benchmarks.__main__ import NAMES
from tests.benchmarks.measure import paired, ratio
from tests.benchmarks.table import HEAD, Row, Table, merge


@pytest.mark.parametrize("name", NAMES)
def test_every_benchmark_loads_without_its_peers(name):
    module = importlib.import_module(f"tests.benchmarks.{name}")
    assert callable(module.measure) and module.TITLE


def test_a_ratio_is_taken_round_by_round():
    assert str(ratio([2.0, 4.0, 9.0], [1.0, 1.0, 3.0])) == "3 (n=3, 2 to 4)"


def test_contenders_take_turns():
    turns: list[str] = []
    costs = paired(
        {name: lambda name=name: turns.append(name) or 1 for name in ("one", "other")}, rounds=2
    )
    assert turns == ["one", "other"] * 3 and [len(values) for values in costs.values()] == [2, 2]


def test_a_section_is_replaced_and_the_others_stay():
    one, other = (
        Table(title, "how", ("ratio",), [Row("ours", ("2",), "1.5x", True)]).markdown()
        for title in ("One", "Other")
    )
    page = merge("", {"Other": other}, ["One", "Other"])
    page = merge(page, {"One": one}, ["One", "Other"])
    assert page.startswith(HEAD) and page.index("## One") < page.index("## Other")
    assert "| ours | 2 | 1.5x: met |" in page
    assert (
        merge(page, {"Other": other.replace("how", "how else")}, ["One", "Other"]).count("how else")
        == 1
    )
