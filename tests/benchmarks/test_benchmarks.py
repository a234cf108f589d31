"""That the benchmarks' tables come out. They themselves take minutes and are `make bench`."""

import importlib

import pytest

from tests.benchmarks import compare, edition, loop, recipe
from tests.benchmarks.__main__ import NAMES
from tests.benchmarks.measure import paired, ratio
from tests.benchmarks.table import HEAD, Row, Table, merge
from tests.trainer.trainings import make_run
from trainer.images.sampler import Share
from trainer.network import build
from trainer.settings.config import TOY
from trainer.training.recipe import Candidate, Recipe


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


def test_a_training_in_memory_trains_by_the_trainers_own_loop(tmp_path):
    run = make_run(tmp_path, loop.compose_settings())
    network = build.build("small_cnn", loop.CLASSES)
    data = loop.InMemory(loop.make_batches(16, 4, 2), Share())
    training = loop.open_in_memory(run, network, data)
    loop.train_epoch_again(training)
    assert training.progress.step > 0


def test_two_revisions_are_compared_round_by_round():
    def run(value: str) -> compare.Cells:
        rows = [Row("ours", (value, "0.5 s")), Row("theirs", ("1,000", "")), Row("text", ("", ""))]
        return compare.numbers(Table("Loop", "A note.", ("ratio", "time"), rows).markdown())

    other, this = [run("2"), run("4")], [run("3"), run("4 (n=1)")]
    text = compare.compared(other, this, "v0.1.0")
    assert "| Loop | ours | ratio | 4 | 4 | 1.25 (n=2, 1 to 1.5) |" in text
    assert "| Loop | theirs | ratio | 1000 | 1000 | 1 (n=2, 1 to 1) |" in text
    assert "| Loop | ours | time | 0.5 | 0.5 | 1 (n=2, 1 to 1) |" in text and "text" not in text


def test_of_two_editions_what_both_have_of_ours_is_held_against_each_other():
    def run(rate: str, seconds: float) -> compare.Cells:
        rows = [
            Row("ours", (rate, "3 (n=1)")),
            Row("a peer", ("5", "")),
            Row("ours, new", ("1", "")),
        ]
        stall = [Row("ours" if rate == "10" else "ours, each", ("40",))]
        tables = (
            Table("Input", "", ("images/s", "throughput"), rows[: 2 + (rate != "10")]),
            Table("Checkpoint stall", "", ("stall, ms",), stall),
        )
        cells = compare.numbers("".join(table.markdown() for table in tables))
        return cells | {("the whole command", "the demo", "seconds"): seconds}

    rows = edition.rows_of([run("10", 6.0)], [run("20", 2.0)])
    assert [(row.name, *row.cells) for row in rows] == [
        ("Input: ours, images/s", "10", "20", "2 (n=1, 2 to 2)"),
        ("Checkpoint stall: ours, each, stall, ms", "40", "40", "1 (n=1, 1 to 1)"),
        ("the whole command: the demo, seconds", "6", "2", "3 (n=1, 3 to 3)"),
    ]


def test_auto_is_held_to_the_best_simple_way_and_to_its_time():
    def done(auto: float, seconds: float) -> Row:
        top1 = {recipe.AUTO: auto, recipe.PROBE: 0.8, recipe.TUNED: 0.5, recipe.SCRATCH: 0.2}
        cpu = {recipe.AUTO: seconds, recipe.TUNED: 100.0}
        rows = {
            method: [
                {"top1": value, "test": 100, "wall": 9.0, "cpu": cpu.get(method, 10.0), "seed": 0}
            ]
            for method, value in top1.items()
        }
        return recipe.row_of("pets", recipe.AUTO, rows)

    row = done(0.77, 240.0)  # 0.8 less its standard error, 0.04
    assert row.met and row.target == "0.760 (the head alone, solved), 2.5x the time: 2.40x"
    assert done(0.75, 240.0).met is False and done(0.77, 260.0).met is False


def test_peers_start_from_pretrained_weights():
    measured = [Candidate("one", accuracy=0.7), Candidate("best", accuracy=0.9), Candidate("none")]
    for chosen, network in (("one", "one"), (TOY, "best")):
        assert recipe.pretrained_of(Recipe({"model.name": chosen}, measured, [])) == network


def test_what_was_not_measured_is_said(tmp_path):
    results = recipe.Results(tmp_path / "results.jsonl", until=float("inf"))
    pets, signs = (recipe.Pictures(name, lambda root, _: root) for name in ("pets", "signs"))
    for method in recipe.METHODS:
        for seed in range(recipe.SEEDS - (method == recipe.FASTAI)):
            keys = {"method": method, "pictures": "pets", "seed": seed, "network": "one"}
            results.get(lambda: {"top1": 0.5}, **keys)
    assert recipe.not_had(results, [pets]) == ["fastai's fine_tune: pets (1 of 3 seeds)"]
    assert recipe.not_had(results, [signs])[0] == "auto: signs"


def test_a_row_of_another_network_than_auto_has_now_does_not_count(tmp_path):
    results = recipe.Results(tmp_path / "results.jsonl", until=float("inf"))
    pets = recipe.Pictures("pets", lambda root, _: root)
    for method, network in ((recipe.AUTO, "new"), (recipe.TIMM, "old"), (recipe.PROBE, "new")):
        keys = {"method": method, "pictures": "pets", "seed": 0, "network": network}
        results.get(lambda: {"top1": 0.5}, **keys)
    counted = [len(recipe.runs_of(results, pets, each)) for each in (recipe.TIMM, recipe.PROBE)]
    assert counted == [0, 1]


def test_a_result_is_kept_and_not_measured_again(tmp_path):
    results = recipe.Results(tmp_path / "results.jsonl", until=float("inf"))
    assert results.get(lambda: {"top1": 0.5}, method="auto", seed=0)
    again = recipe.Results(tmp_path / "results.jsonl", until=0.0)
    assert again.get(dict, method="auto", seed=0) == {"method": "auto", "seed": 0, "top1": 0.5}
    assert again.get(dict, method="auto", seed=1) is None


def test_clothes_come_in_the_numbers_asked_for(tmp_path):
    root = recipe.clothes_of(40)(tmp_path / "clothes", 0)
    assert [recipe.count(root, split) for split in ("train", "valid", "test")] == [40, 10, 500]
    assert recipe.passes_of(40) == 60
