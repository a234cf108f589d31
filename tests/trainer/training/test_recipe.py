import contextlib
import copy
import json
import math
import operator
import random
import re
import shutil
import signal
import subprocess
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from tests.conftest import ended, refusal, run_trainer, start_trainer
from tests.soak import difference, outcome
from trainer.common.errors import OK
from trainer.images.folder import ImageFolder, Split
from trainer.results import outcome as outcome_module
from trainer.settings import config as settings
from trainer.settings.compose import compose
from trainer.settings.config import Config, solve_on_for
from trainer.training import decision as decision_module
from trainer.training import recipe as recipe_module
from trainer.training.decision import EPOCHS, Decision, Judged, Tried, needed_gain
from trainer.training.recipe import FILE, FORMAT, Candidate, applied, may_differ_by, table
from trainer.training.training import Training

SMALL = ("shufflenet_v2_x0_5", "squeezenet1_1")


@pytest.fixture(scope="module")
def weights_dir(tmp_path_factory) -> Path:
    """Weights of two small networks, as good as random ones are."""
    root = tmp_path_factory.mktemp("weights")
    for number, name in enumerate(SMALL):
        torch.manual_seed(number)
        torch.save(torchvision_state(name), root / f"{name}.pth")
        (root / f"{name}.json").write_text(
            json.dumps({"mean": [0.5] * 3, "std": [0.5] * 3, "size": 32, "resize": 36})
        )
    return root


def torchvision_state(name: str) -> dict[str, torch.Tensor]:
    import torchvision  # imported here: slow, and this test's alone

    return torchvision.models.get_model(name).state_dict()


def words(pictures: Path, weights_dir: Path, *more: str) -> list[str]:
    return [
        f"data.root={pictures}", f"model.weights_dir={weights_dir}", "name=run",
        "platform.runs=runs", "platform.cache=cache", "train.batch_size=8", *more,
    ]  # fmt: skip


def written(cwd: Path) -> dict[str, Any]:
    recipe: dict[str, Any] = json.loads((cwd / "runs/run/checkpoints/recipe.json").read_text())
    return recipe


# --- what is chosen of what was measured ---


def judged(name: str, gflops: float, correct: int, of: int = 100, first: int = 0) -> Judged:
    """A network whose probe tells so many of 100 images, from the one with number `first` on."""
    row = Candidate(name, accuracy=correct / of, error=0.04, gflops=gflops)
    logits = torch.eye(2)[((np.arange(of) - first) % of >= correct).astype(np.int64)]
    network = SimpleNamespace(candidate=row)
    return Judged(network, logits, np.zeros(of, np.int64))  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def undecided() -> Config:
    """The settings of model=auto, composed once."""
    settings.register()
    return compose(["data.root=/nowhere", "model=auto"])


FOLDER = SimpleNamespace(
    splits={split: SimpleNamespace(labels=np.arange(4), paths=()) for split in ("train", "valid")},
    classes=tuple("abcd"),
    count=lambda _: 4,
)
HALVES = [(np.arange(4), FOLDER), (np.arange(4, 8), FOLDER)]


def decision(undecided: Config, values: dict[str, Any] | None = None) -> Decision:
    """One that has measured nothing. values: of settings, by dotted key."""
    made = object.__new__(Decision)
    made.config = copy.deepcopy(undecided)
    for key, value in (values or {}).items():
        section, _, name = key.rpartition(".")
        setattr(operator.attrgetter(section)(made.config), name, value)
    made.reasons = []
    return made


@pytest.mark.parametrize(
    ("prefer", "chosen"), [("accuracy", "large"), ("balance", "half"), ("speed", "small")]
)
def test_what_is_cheaper_must_be_no_worse_beyond_doubt_picture_by_picture(
    undecided, prefer, chosen
):
    rows = [judged("small", 0.3, 88), judged("half", 2, 90), judged("large", 4, 91)]
    rows += [judged("hardly cheaper", 3, 90), judged("waste", 9, 90), judged("bad", 0.1, 80)]
    made = decision(undecided, {"recipe.prefer": prefer})
    assert rows[made.cheapest(rows)].network.candidate.name == chosen
    assert chosen in made.reasons[0]


def test_what_is_hard_for_both_networks_is_no_doubt():
    best = judged("best", 4, 90)
    alike, elsewhere = judged("alike", 1, 84), judged("elsewhere", 1, 84, first=40)
    worse = [decision_module._worse_by(each, best) for each in (alike, elsewhere)]
    assert worse[0] > 2 > worse[1] > 1
    assert decision_module._worse_by(best, best) == 0


def test_a_balance_asks_for_half_the_computing(undecided):
    # 2,000 clothes: 0.820 for 0.38 GFLOP is better than 0.792 for 0.30.
    rows = [judged("dearer", 0.38, 410, 500), judged("cheaper", 0.30, 396, 500, first=10)]
    made = decision(undecided)
    assert rows[made.cheapest(rows)].network.candidate.name == "dearer"
    assert "is the most accurate" in made.reasons[0]


def test_flips_are_off_only_where_they_hurt_beyond_doubt(undecided, monkeypatch):
    plain = judged("one", 1, 90)
    for correct, flip in ((60, False), (89, True), (95, True)):
        made = decision(undecided)
        monkeypatch.setattr(made, "judge", lambda *_, correct=correct: judged("one", 1, correct))
        assert made.with_flips(plain) == {"data.augment.flip": flip}, correct
    assert decision(undecided, {"data.augment.flip": True}).with_flips(plain) == {}


def test_parts_of_pictures_are_shown_unless_they_tell_less_beyond_doubt(undecided, monkeypatch):
    network = SimpleNamespace(images=SimpleNamespace(
        splits={split: SimpleNamespace(labels=np.zeros(50)) for split in ("train", "valid")}
    ))  # fmt: skip
    monkeypatch.setattr(decision_module, "_cropped", lambda _, scale: scale)
    for correct, scale in ((60, [0.9, 1.0]), (80, [0.25, 1.0]), (95, [0.25, 1.0])):
        made = decision(undecided)
        # They are wrong about other pictures, so one answer more is no certainty.
        seen = {(0.25, 1.0): judged("one", 1, correct, first=20), (0.9, 1.0): judged("one", 1, 90)}
        monkeypatch.setattr(made, "judge", lambda cut, _, seen=seen: seen[cut])
        chosen = made.with_crops(network)  # type: ignore[arg-type]
        assert chosen == {"data.augment.scale": scale}, correct
    given = decision(undecided, {"data.augment.scale": [0.5, 1.0]})
    assert given.with_crops(network) == {}  # type: ignore[arg-type]


def test_everything_is_fine_tuned_where_the_time_is_there(undecided):
    row = judged("one", 1, 90)
    row.network.candidate.milliseconds = 3
    object.__setattr__(row, "network", SimpleNamespace(
        candidate=row.network.candidate,
        images=SimpleNamespace(**vars(FOLDER) | {"count": lambda _: 2000}),
    ))  # fmt: skip
    device = SimpleNamespace(device=SimpleNamespace(type="cpu"))

    def values(given: dict[str, Any]) -> dict[str, Any]:
        made = decision(undecided, given)
        made.machine = device  # type: ignore[assignment]
        made.with_crops = lambda _: {}  # type: ignore[method-assign]
        made.better_way = lambda *_: {}  # type: ignore[method-assign]
        return made.training(row, {})

    usual = values({"optim.lr": 1e-4})  # a pass takes 3 ms * 3 * 2000, 0.3 minutes
    assert usual["model.freeze"] == "none" and usual["train.epochs"] == EPOCHS
    assert values({"recipe.tune_minutes": 1.6, "optim.lr": 1e-4})["train.epochs"] == 5
    # Two ways, each tried on 500 pictures: half as much again.
    assert values({"recipe.tune_minutes": 2.4})["train.epochs"] == 5
    assert values({"recipe.tune_minutes": 0.9})["train.epochs"] == 0
    assert values({"recipe.tune_minutes": 0})["model.freeze"] == "backbone"
    assert values({"model.freeze": "backbone"})["train.epochs"] == 0
    asked = {"model.freeze": "none", "recipe.tune_minutes": 0}
    assert values(asked)["train.epochs"] == EPOCHS
    assert values({"train.epochs": 20, "optim.lr": 1e-4})["train.epochs"] == 10
    assert values({"train.epochs": 20, "recipe.minutes": None})["train.epochs"] == 20


@pytest.mark.parametrize(
    ("gains", "way", "trials"),
    [((0, 0), 1, [0, 0]), ((0, 1, 1), 1, [0, 0, 1]), ((1, 1), 0, [0, 1]), ((1, -2), 0, [0, 1])],
    ids=["both hopeless", "the second", "the first", "the other half says no"],
)
def test_the_first_way_that_is_not_hopeless_on_one_half_is_asked_of_the_other(
    undecided, monkeypatch, gains, way, trials
):
    made, asked, rates = decision(undecided), [], []
    network = SimpleNamespace(images=FOLDER, loader=SimpleNamespace(read=None))
    monkeypatch.setattr(decision_module, "_halves", lambda *_: HALVES)
    monkeypatch.setattr(decision_module.weights, "resolve", lambda config, _: config)

    def trial(config: Any, *arguments: Any) -> SimpleNamespace:
        asked.append(arguments[-1])
        rates.append(config.optim.lr)
        return SimpleNamespace(
            probe_losses=torch.full((4,), float(gains[len(rates) - 1])),
            metrics_file=SimpleNamespace(rows=[{"valid_top1": 0.5}]),
        )

    every_one_right = torch.tensor([[50.0, 0.0]] * 4), torch.zeros(4, dtype=torch.int64)
    for name, work in (
        ("trial", trial), ("answers", lambda *_: every_one_right), ("forget_trials", lambda: None)
    ):  # fmt: skip
        monkeypatch.setattr(made, name, work)
    ways = made.ways(FOLDER)  # type: ignore[arg-type]
    values = {"model.head": "probe", "model.freeze": "none", "model.weights": "DEFAULT"}
    tried = made.tuned_halves(network, values, ways)  # type: ignore[arg-type]
    assert asked == trials and tried.way == ways[way]
    assert rates == [1e-4, 2e-4, 2e-4][: len(rates)] if way else [1e-4, 1e-4]
    assert tried.better == (sum(gains) > 0)


def test_with_many_pictures_of_a_class_fine_tuning_is_taken_unless_something_speaks_against_it(
    undecided,
):
    labels = np.arange(4).repeat(10)
    splits = {"train": SimpleNamespace(labels=labels), "valid": SimpleNamespace(labels=labels[:0])}
    many = SimpleNamespace(splits=splits, classes=tuple("abcd"))
    further, small = decision(undecided).ways(many)  # type: ignore[arg-type]
    assert further["optim.lr"] == 2e-4 and small == {}
    assert decision(undecided).ways(FOLDER) == [small, further]  # type: ignore[arg-type]
    doubt = np.array([1.0, -1.0] * 8)  # a standard error of 0.26
    for gain, hits, of_many, of_few in (
        (-0.2, 1, False, False), (-0.1, 1, True, False), (0.1, 1, True, False),
        (0.2, 1, True, True), (0.2, -1, True, False),
    ):  # fmt: skip
        for images, better in ((many, of_many), (FOLDER, of_few)):
            needed = needed_gain(images)  # type: ignore[arg-type]
            assert Tried({}, doubt + gain, hits, needed).better == better, (gain, hits, needed)
    assert Tried({}, doubt - 0.3, 0, needed_gain(many)).hopeless  # type: ignore[arg-type]
    assert not Tried({}, doubt - 0.2, 0, needed_gain(many)).hopeless  # type: ignore[arg-type]
    assert Tried({}, doubt - 0.1, 0, needed_gain(FOLDER)).hopeless  # type: ignore[arg-type]


def test_with_fewer_than_four_pictures_of_a_class_the_head_alone_is_solved(undecided):
    made = decision(undecided, {"train.batch_size": 4, "recipe.tune_minutes": 99.0})
    made.with_crops = lambda _: {}  # type: ignore[method-assign]
    made.tuned_halves = lambda *_: Tried({}, np.ones(2), 1, 0.5)  # type: ignore[method-assign]
    few = Candidate("one", milliseconds=1)
    for of_train, freeze in ((2, "backbone"), (3, "none")):
        counts = {"train": of_train, "valid": 1}
        splits = {
            split: SimpleNamespace(labels=np.arange(4).repeat(count), paths=())
            for split, count in counts.items()
        }
        images = SimpleNamespace(
            splits=splits, classes=tuple("abcd"), count=lambda split, c=counts: 4 * c[split]
        )
        network = SimpleNamespace(candidate=few, images=images)
        row = Judged(network, torch.zeros(1, 4), np.zeros(1, np.int64))  # type: ignore[arg-type]
        assert made.training(row, {})["model.freeze"] == freeze, of_train


@pytest.mark.parametrize(("better", "trials"), [(True, [0, 1]), (False, [0])])
def test_a_small_network_is_asked_of_the_other_half_only_where_it_is_better_on_the_first(
    undecided, monkeypatch, better, trials
):
    made, asked = decision(undecided), []
    monkeypatch.setattr(decision_module, "_halves", lambda *_: HALVES)
    monkeypatch.setattr(decision_module, "_chosen_apart", lambda part, _: part)
    monkeypatch.setattr(decision_module, "_side", lambda _: 16)
    monkeypatch.setattr(decision_module.weights, "resolve", lambda config, _: config)

    def trial(*arguments: Any) -> SimpleNamespace:
        asked.append(arguments[-1])
        return SimpleNamespace(load_best_weights=lambda: None)

    every_one_right = torch.tensor([[50.0, 0.0]] * 4), torch.zeros(4, dtype=torch.int64)
    for name, work in (
        ("trial", trial), ("answers", lambda *_: every_one_right),
        ("forget_trials", lambda: None), ("pools", lambda _: True),
    ):  # fmt: skip
        monkeypatch.setattr(made, name, work)
    head = judged("one", 1, 0 if better else 8, of=8)
    object.__setattr__(head, "network", SimpleNamespace(images=FOLDER))
    assert (made.small(head, {}) is not None) == better
    assert asked == trials


@pytest.mark.parametrize(("epochs", "tried"), [(8, 15), (2, 5)])
def test_where_valid_is_large_the_way_is_what_is_best_on_some_pictures(
    undecided, monkeypatch, epochs, tried
):
    made, asked = decision(undecided, {"train.batch_size": 50}), []
    ways = made.ways(FOLDER)  # type: ignore[arg-type]
    many = SimpleNamespace(images=SimpleNamespace(count=lambda _: 1000))
    some = SimpleNamespace(images=SimpleNamespace(count=lambda _: 400))
    monkeypatch.setattr(decision_module, "_labels", lambda _: np.zeros(1250))
    monkeypatch.setattr(decision_module, "_sampled", lambda *_: some)
    monkeypatch.setattr(decision_module.weights, "resolve", lambda config, _: config)

    def trial(config: Any, images: Any, network: Any, number: int) -> float:
        assert images is some.images and network is some
        asked.append((config.train.epochs, config.optim.lr))
        return [1.0, 5.0][number]  # the second way is surer of what is right

    def answers(sureness: float, split: str) -> tuple[torch.Tensor, torch.Tensor]:
        assert split == "valid"
        logits = sureness * torch.tensor([[1.0, 0.0]] * 9 + [[0.2, 0.0]])
        return logits, torch.tensor([0] * 9 + [int(sureness < 2)])

    for name, work in (("trial", trial), ("answers", answers), ("forget_trials", lambda: None)):
        monkeypatch.setattr(made, name, work)
    values = {"model.head": "probe", "model.freeze": "none", "model.weights": "DEFAULT"}
    chosen = made.better_way(many, values | {"train.epochs": epochs}, ways)  # type: ignore[arg-type]
    assert chosen == ways[1]
    # 400 pictures are 8 steps: in as many as the training has, 20 in an epoch, and at most 120.
    assert asked == [(tried, 1e-4), (tried, 2e-4)]


def test_a_recipe_is_settings(undecided):
    assert undecided.optim.lr is None
    done = applied(
        undecided, {"model.name": "resnet18", "model.freeze": "none", "model.head": "probe"}
    )
    assert done.model.name == "resnet18" and done.optim.lr == 1e-4
    assert undecided.model.name == "auto", "the settings that were given stay as they are"


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("model.weights=null", "model=small_cnn"),
        ("model.weights=some.pth", "model.name=NAME"),
        ("model.head_hidden=8", "its head is linear"),
    ],
)
def test_what_contradicts_a_choice_is_refused(given, said):
    line = refusal("data.root=/nowhere", "model=auto", given)
    assert line is not None and given.split("=")[0] in line and said in line


@pytest.mark.parametrize("more", ["train.epochs=0", "model.head=probe model.head_hidden=8"])
def test_what_a_head_cannot_be_is_refused(more):
    assert refusal("data.root=/nowhere", "model.name=resnet18", *more.split()) is not None


def test_the_table_fits_a_terminal_of_80_columns():
    names = ("timm/tf_efficientnet_lite0.in1k", "resnet50")
    rows = [
        Candidate(name, "apache-2.0", 0.8285, 0.0253, 12.34, megabytes=330, milliseconds=123.4)
        for name in names
    ]
    head, *lines = table([*rows, Candidate("absent", left_out="no weights")])
    assert max(map(len, (head, *lines))) <= 80
    assert [line.split()[-1] for line in lines] == [*names]
    assert "82.8% +- 2.5%" in lines[0]


# --- whole runs ---


def test_a_folder_and_weights_are_all_that_it_needs(tmp_path, pictures, weights_dir):
    given = words(pictures, weights_dir, "train.epochs=2")
    code, output = run_trainer(tmp_path, *given)
    assert code == OK, output
    halves = re.findall("fine-tuning (.*) on one half of the pictures: 1 of 2", output)
    assert halves and {*halves} <= {"at small learning rates", "at larger learning rates"}
    assert len({*halves}) == len(halves)
    assert not (tmp_path / "runs/run/recipe").exists()
    assert not (tmp_path / "runs/run/checkpoints/recipe").exists()
    recipe = written(tmp_path)
    assert [each["name"] for each in recipe["candidates"]] == sorted(SMALL)
    assert all(each["pictures"] == 33 for each in recipe["candidates"])  # by k-fold
    assert recipe["settings"]["model.name"] in SMALL
    for line in recipe["reasons"]:
        assert f"recipe: {line}" in output
    rows = (tmp_path / "runs/run/metrics.jsonl").read_text().splitlines()
    assert json.loads(rows[0])["epoch"] == 0, "the probe comes first"
    assert (tmp_path / "runs/run/model.tar.gz").exists()
    (tmp_path / "runs/run/checkpoints/recipe.json").unlink()  # each checkpoint holds it too
    code, output = run_trainer(tmp_path, *given)
    assert code == OK and "this run is complete" in output, output
    assert written(tmp_path) == recipe and "recipe: " not in output


def test_flips_are_left_out_of_pictures_that_mirrored_are_of_another_class(tmp_path, weights_dir):
    rng = np.random.default_rng(0)
    # It rises to the right, again and again.
    ramp = np.tile(np.arange(0, 256, 32, dtype=np.uint8), (32, 4))
    for split, count in (("train", 24), ("valid", 8), ("test", 8)):
        for name, pixels in (("rising", ramp), ("falling", ramp[:, ::-1])):
            place = tmp_path / "signs" / split / name
            place.mkdir(parents=True)
            for number in range(count):
                noise = rng.integers(0, 30, (32, 32), np.uint8)
                shown = np.roll(pixels, number, axis=1) + noise
                Image.fromarray(shown).save(place / f"{number}.png")
    more = ("model.candidates=[squeezenet1_1,timm/no_such_network]", "train.epochs=0")
    code, output = run_trainer(tmp_path, *words(tmp_path / "signs", weights_dir, *more))
    assert code == OK, output
    assert "left out: timm/no_such_network" in output
    assert "the only one available" in output
    assert "mirroring the pictures makes it worse: data.augment.flip=false" in output
    assert written(tmp_path)["settings"]["data.augment.flip"] is False


def test_what_ruins_a_network_is_not_kept(tmp_path, pictures, weights_dir):
    ruinous = (
        "optim.lr=1", "train.clip_norm=1", "train.epochs=2", "model.freeze=none",
        "model.candidates=[squeezenet1_1]",
    )  # fmt: skip
    code, output = run_trainer(tmp_path, *words(pictures, weights_dir, *ruinous))
    assert code == OK, output
    result = json.loads((tmp_path / "runs/run/result.json").read_text())
    assert result["best_epoch"] == 0 and result["epochs"] == 2


def test_without_any_weights_it_trains_from_scratch_and_says_so(tmp_path, pictures):
    (tmp_path / "empty").mkdir()
    few = ("train.epochs=1", "data.size=16")
    code, output = run_trainer(tmp_path, *words(pictures, tmp_path / "empty", *few))
    assert code == OK, output
    assert "trained from scratch" in output and "model.weights_dir" in output


def test_each_of_its_settings_has_its_effect(tmp_path, pictures, weights_dir):
    more = (
        "recipe.minutes=null",
        "recipe.prefer=speed",
        "recipe.tune_minutes=0",
        "model.candidates=[squeezenet1_1]",
        "train.epochs=1",
    )
    code, output = run_trainer(tmp_path, *words(pictures, weights_dir, *more))
    assert code == OK, output
    recipe = written(tmp_path)
    assert [each["name"] for each in recipe["candidates"]] == ["squeezenet1_1"]
    assert "small_cnn from scratch, at " in output and "which isn't better beyond doubt" in output
    assert "the head alone is solved" in output
    assert recipe["settings"]["train.epochs"] == 0
    # The same by name, without a recipe.
    shutil.rmtree(tmp_path / "runs")
    more = ("model.name=squeezenet1_1", "model.head=probe", "train.epochs=0")
    again, said = run_trainer(
        tmp_path, *words(pictures, weights_dir, *more, "model.freeze=backbone")
    )
    assert again == OK, said
    assert accuracy(said) == accuracy(output)
    assert "the solved head, nothing trained" in said
    # Valid has 9: the head is solved on these too, and all 33 calibrate, by heads without them.
    assert "the head is solved on the 33 pictures of train and valid" in said
    assert "by 33 pictures that it wasn't trained on" in said
    row = json.loads((tmp_path / "runs/run/metrics.jsonl").read_text().splitlines()[0])
    assert row["seen_loss"] < row["valid_loss"], "valid's figures are not of what the head has seen"


def test_where_there_is_no_test_the_figures_are_of_heads_that_did_not_see_the_picture(
    tmp_path, pictures, weights_dir
):
    shutil.copytree(pictures, tmp_path / "some")
    shutil.rmtree(tmp_path / "some/test")
    more = ("model.name=squeezenet1_1", "model.head=probe", "train.epochs=0")
    given = words(tmp_path / "some", weights_dir, *more, "model.freeze=backbone")
    code, output = run_trainer(tmp_path, *given, "model.solve_on=both")
    assert code == OK, output
    result = json.loads((tmp_path / "runs/run/result.json").read_text())
    row = json.loads((tmp_path / "runs/run/metrics.jsonl").read_text().splitlines()[0])
    assert result["split"] == "valid" and result["calibration"]["pictures"] == 33
    assert result["loss"] == pytest.approx(row["valid_loss"], rel=1e-3)
    assert result["loss"] > row["seen_loss"] * 1.01


def a_training(test: str | None, solve_on: str = "both") -> Any:
    splits = {"train": ("a", "b"), "valid": ("c", "d")} | ({"test": ("e", test)} if test else {})
    folder = SimpleNamespace(
        splits={name: SimpleNamespace(paths=paths) for name, paths in splits.items()},
        digests={path: path for paths in splits.values() for path in paths},
    )
    model = SimpleNamespace(head="probe", solve_on=solve_on)
    return SimpleNamespace(
        config=SimpleNamespace(model=model), loader=SimpleNamespace(folder=folder)
    )


@pytest.mark.parametrize(
    ("test", "solve_on", "sees"),
    [("f", "both", True), (None, "both", True), ("c", "both", False), ("f", "train", False)],
)
def test_a_head_is_not_solved_on_pictures_that_test_has_too(test, solve_on, sees):
    of = Training.head_saw_valid.fget
    assert of is not None and of(a_training(test, solve_on)) == sees


def test_pictures_of_test_that_valid_nearly_has_are_no_clean_ones():
    run = a_training("f")
    run.findings = SimpleNamespace(leaked={}, in_valid={"f"})
    for sees, clean in ((False, [0, 1]), (True, [0])):
        run.head_saw_valid = sees
        assert outcome_module._clean(run, "test").tolist() == clean
        assert outcome_module._clean(run, "valid").tolist() == [0, 1]


@pytest.mark.parametrize(
    "more", ["train.epochs=3", "train.epochs=0 train.tta=flip", "train.epochs=0 package.int8=true"]
)
def test_a_head_is_not_solved_on_what_must_judge(configure, more):
    given = ("model.name=resnet18", "model.head=probe", *more.split())
    line = refusal("data.root=/nowhere", *given, "model.solve_on=both")
    assert line is not None and "model.solve_on=train" in line
    assert solve_on_for(configure("data.root=/nowhere", *given), 10) == "train"


def test_each_picture_counts_where_valid_has_few(configure):
    given = ("data.root=/nowhere", "model.name=resnet18", "model.head=probe", "train.epochs=0")
    assert [solve_on_for(configure(*given), count) for count in (199, 200)] == ["both", "train"]
    assert solve_on_for(configure(*given, "model.solve_on=train"), 10) == "train"
    assert solve_on_for(configure(*given, "model.solve_on=both"), 1000) == "both"


@pytest.mark.parametrize(
    ("key", "freeze", "differs"),
    [
        ("optim.lr", "auto", True),
        ("optim.lr", "none", False),
        ("train.label_smoothing", "none", False),
        ("train.epochs", "none", True),
        ("seed", "none", True),
        ("data.size", "none", True),
        ("checkpoint.minutes", "auto", False),
        ("package.int8", "auto", False),
    ],
)
def test_trials_have_one_recipe_where_it_can_be_no_other(configure, key, freeze, differs):
    config = configure("data.root=/nowhere", "model=auto", f"model.freeze={freeze}")
    assert may_differ_by(config, [key]) == differs


def test_what_chooses_a_small_networks_epoch_does_not_judge_it():
    labels = np.repeat(np.arange(3), 12)
    train = Split(tuple(f"t{number}" for number in range(36)), labels)
    judged_by = Split(("v0", "v1"), np.array([0, 1]))
    images = ImageFolder(("a", "b", "c"), {"train": train, "valid": judged_by}, ())
    apart = decision_module._chosen_apart(images, seed=0).splits
    assert apart["judged"] is judged_by
    assert sorted(apart["train"].paths + apart["valid"].paths) == sorted(train.paths)
    assert np.bincount(apart["valid"].labels).tolist() == [2, 2, 2]


@pytest.mark.parametrize("said", [["train.margin=-5"], ["train.keep=last", "train.margin=5"]])
def test_what_counts_as_better_than_a_solved_head_can_be_said(
    tmp_path, pictures, weights_dir, said
):
    more = ("model.name=shufflenet_v2_x0_5", "model.head=probe", "model.freeze=none")
    given = words(pictures, weights_dir, *more, "train.epochs=1", *said)
    code, output = run_trainer(tmp_path, *given)
    assert code == OK, output
    result = json.loads((tmp_path / "runs/run/result.json").read_text())
    assert result["best_epoch"] == 1


@pytest.mark.parametrize(
    ("gain", "top1", "margin", "better"),
    [
        (0.03, 0.6, 1.0, True),
        (0.03, 0.4, 1.0, False),
        (0.03, 0.6, 50.0, False),
        (-0.03, 0.4, -5.0, True),
        (math.nan, 0.6, 1.0, False),
    ],
)
def test_what_is_trained_on_a_solved_head_must_be_better_by_the_margin(gain, top1, margin, better):
    training = SimpleNamespace(
        progress=SimpleNamespace(best={"epoch": 0, "valid_top1": 0.5}),
        config=SimpleNamespace(
            model=SimpleNamespace(head="probe"), train=SimpleNamespace(margin=margin, keep="best")
        ),
    )
    metrics = {"gain": gain, "gain_error": 0.02, "valid_top1": top1}
    assert Training.is_best(training, metrics) == better  # type: ignore[arg-type]
    # The last is kept, but where it is worse than the solved head beyond doubt.
    training.config.train.keep, training.config.train.margin = "last", 1.0
    assert Training.is_best(training, metrics) == (gain > -0.02)  # type: ignore[arg-type]
    training.progress.best["epoch"] = 3
    assert Training.is_best(training, metrics) == (gain > -0.02)  # type: ignore[arg-type]


def accuracy(output: str) -> str:
    return next(line for line in output.splitlines() if line.startswith("test accuracy"))


def test_small_pictures_are_for_a_small_network_where_it_is_better_beyond_doubt(
    tmp_path, pictures, weights_dir
):
    # The features of this one, of random weights, tell little.
    more = ("model.candidates=[shufflenet_v2_x0_5]", "train.epochs=12")
    code, output = run_trainer(tmp_path, *words(pictures, weights_dir, *more))
    assert code == OK, output
    assert "these pictures are small, and it is better beyond doubt" in output
    assert "\nmodel: small_cnn, from scratch" in output
    assert written(tmp_path)["settings"]["model.name"] == "small_cnn"


@pytest.mark.parametrize("kills", [2, pytest.param(20, marks=pytest.mark.long)])
def test_a_kill_at_any_moment_gives_the_same_decision_and_bits(
    tmp_path, pictures, weights_dir, kills
):
    command = words(
        pictures, weights_dir, "recipe.minutes=null", "train.epochs=1",
        "checkpoint.minutes=1e-4", "checkpoint.max_cost=1",
    )  # fmt: skip
    if kills == 2:  # a choice of one takes less time, and has all the other decisions
        command.append("model.candidates=[squeezenet1_1]")
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    for each in (whole, cut):
        each.mkdir()
    began = time.time()
    code, output = run_trainer(whole, *command)
    assert code == OK, output
    recipe = untimed(written(whole))
    # As long as it takes to decide here, now: so the kills fall into it under any load.
    deciding = (whole / "runs/run/checkpoints" / FILE).stat().st_mtime - began
    rng = random.Random(0)
    for left in reversed(range(kills)):
        process = start_trainer(cut, *command)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(rng.uniform(0.05, 1.0) * deciding)
        process.send_signal(signal.SIGKILL)
        process.communicate(timeout=60)
        if left and (cut / "runs/run/checkpoints" / FILE).exists():
            assert untimed(written(cut)) == recipe
            shutil.rmtree(cut)  # so that the next kill falls into a recipe too
            cut.mkdir()
    code, output = ended(start_trainer(cut, *command))
    assert code == OK, output
    assert untimed(written(cut)) == recipe
    assert difference(*(outcome(each / "runs/run") for each in (whole, cut))) is None


def untimed(recipe: dict[str, Any]) -> dict[str, Any]:
    for row in recipe["candidates"]:
        del row["milliseconds"]
    del recipe["reasons"]  # they tell minutes
    return recipe


def test_a_repeated_run_follows_what_is_written(tmp_path, pictures, weights_dir):
    chosen = {"model.name": SMALL[0], "model.head": "probe", "model.freeze": "backbone"}
    recipe: dict[str, Any] = {"settings": chosen | {"train.epochs": 0}, "format": FORMAT}
    place = tmp_path / "runs/run/checkpoints"
    place.mkdir(parents=True)
    (place / FILE).write_text(json.dumps(recipe | {"candidates": [], "reasons": []}))
    code, output = run_trainer(tmp_path, *words(pictures, weights_dir, "train.epochs=0"))
    assert code == OK and f"model: {SMALL[0]}," in output, output
    assert "as decided earlier" in output


@pytest.mark.parametrize(
    "change",
    [{"settings": []}, {"settings": {"no.setting": 1}}, {"reasons": [5]}, {"candidates": {"a": 1}}],
    ids=str,
)
def test_what_is_no_recipe_is_not_followed(tmp_path, caplog, change):
    recipe = {"settings": {}, "candidates": [], "reasons": [], "format": FORMAT}
    path = tmp_path / FILE
    path.write_text(json.dumps(recipe))
    assert recipe_module._written(path) is not None
    path.write_text(json.dumps(recipe | change))
    assert recipe_module._written(path) is None
    assert f"{path} can't be read" in caplog.text
