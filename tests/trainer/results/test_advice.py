"""What a run advises for the next one, the order of classes, and the run before."""

import dataclasses

import numpy as np
import pytest

from trainer.images.care import Finding, Findings
from trainer.results import confusion
from trainer.results.advice import Known, advice
from trainer.results.outcomes import Outcomes
from trainer.training.recipe import Candidate, Recipe

FINE = {"epoch": 10, "train_top1": 0.8, "valid_top1": 0.79, "valid_loss": 1.0, "seconds": 10.0}
GOOD = Known(
    history=[FINE | {"epoch": epoch} for epoch in range(1, 11)],
    best_epoch=8,
    config={"data.leaks": "warn", "train.imbalance": "none", "model.name": "resnet18"},
    counts={"train": np.array([500, 500])},
    split="test",
    hits=900,
    pictures=1000,
    findings=Findings(),
    recipe=None,
    again=lambda *words: " ".join(("again", *words)),
)
FALLING = [FINE | {"epoch": epoch, "valid_loss": 2 - epoch / 10} for epoch in range(1, 11)]
LEARNED = [FINE | {"epoch": 8, "train_top1": 1.0, "valid_top1": 0.84}]
WAITING = [FINE | {"epoch": 8, "seconds": 100.0, "data_wait": 50.0}]
MEASURED = [
    Candidate("resnet18", accuracy=0.8, error=0.02),
    Candidate("resnet50", accuracy=0.81, error=0.02),
    Candidate("small", accuracy=0.5, error=0.02),
]


def test_where_all_is_well_there_is_nothing_to_say():
    assert advice(GOOD) == []


@pytest.mark.parametrize(
    ("changes", "seen", "command"),
    [
        ({"history": LEARNED}, "overfits: 100% on train, 84.0%", "again data.augment.trivial=true"),
        ({"history": FALLING, "best_epoch": 10}, "best of 10", "again train.epochs=20"),
        ({"counts": {"train": np.array([9, 9, 0])}}, "few pictures: 9 ", "again"),
        (
            {"counts": {"train": np.array([900, 30])}},
            "900 training pictures, the smallest 30",
            "again train.imbalance=logits train.monitor=valid_f1",
        ),
        ({"hits": 113, "pictures": 148}, "148 test pictures tell the accuracy to 7 points", ""),
        (
            {"recipe": Recipe({}, MEASURED, [])},
            "resnet18 and resnet50 are as good as equal",
            "again model.name=resnet50",
        ),
        ({"findings": Findings(leaked={"a": True})}, "1 picture of valid", "again data.leaks=drop"),
        ({"findings": Findings([Finding("doubt", ())])}, "1 label may be wrong", "again"),
        ({"history": WAITING}, "50.0% of the training time", ""),
    ],
    ids=lambda value: value[:20] if isinstance(value, str) else "",
)  # fmt: skip
def test_each_thing_that_is_seen_has_its_word(changes, seen, command):
    (said,) = advice(dataclasses.replace(GOOD, **changes))
    assert seen in said.seen and said.command == command


def test_classes_that_look_alike_are_side_by_side():
    rng = np.random.default_rng(0)
    group = np.array([0, 1, 2, 0, 1, 2, 0, 1, 2])  # of each class
    labels = np.arange(9).repeat(20)
    given = np.where(group[labels][:, None] == group, 0.2, 0.01) + rng.random((180, 9)) / 100
    given[np.arange(180), labels] += 1
    names = [str(number) for number in range(9)]
    outcomes = Outcomes(names, labels, given / given.sum(1, keepdims=True), ["p"] * 180)
    order = confusion.by_likeness(outcomes)
    assert sorted(order) == list(range(9))
    groups = group[order].tolist()
    assert [groups[place] for place in (0, 3, 6)] == list(dict.fromkeys(groups))
    matrix = confusion.matrix(outcomes)
    assert matrix.names == [names[place] for place in order]
    assert all(cell.row == cell.column for cell in matrix.cells)
