"""Each setting's way from the command line to where it acts: what it changes, and nothing else."""

import json
import shutil
from collections.abc import Iterable
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.conftest import ended, environment, make_pictures, start
from tests.shared import made_once
from tests.trainer.settings.test_settings import ALWAYS, ELSEWHERE, SWEEPS
from trainer.common.errors import OK
from trainer.images.augment import Augmentation
from trainer.network.build import build
from trainer.settings import config as settings

# How each run begins: three steps an epoch, of all layers of a network without pretrained weights.
BEGIN = (
    "name=run", "data=folder", "data.root=pictures", "model=small_cnn", "platform=local",
    "platform.cache=cache", "data.size=12", "data.resize=14", "data.workers=0",
    "train.epochs=2", "train.batch_size=4",
)  # fmt: skip
PRETRAINED = ("model.weights=start.pth", "model.freeze=none")
HEAD = ("model.weights=start.pth", "model.freeze=backbone")

# Facts (tests/trainer/settings/wiring.py) that change together.
SCORES = {"valid's figures", "test's figures", "calibration", "reported"}
KEPT = {"packaged weights", "means"} | SCORES  # by other weights of the network that is evaluated
LEARNT = {"gradients", "trained weights", "train's figures"} | KEPT
SEEN = {"views", "inputs"} | LEARNT
ORDER = {"order"} | SEEN
RATES = {"rates", "head's rates"}
VIEW = {f"view's {each.name}" for each in fields(Augmentation)}
PLACES = {"run's place", "checkpoints' place", "package's place"}


@dataclass(frozen=True)
class Wire:
    """What must differ where a setting is given, and nothing else.

    word: as it is typed. given: what both runs have besides. shows: facts that have this value with
    it. may: what other machines' last bits may change too. refused: how the line begins with which
    the run ends.
    """

    word: str
    differs: set[str]
    given: tuple[str, ...] = ()
    shows: dict[str, Any] = field(default_factory=dict)
    may: set[str] = field(default_factory=set)
    refused: str = ""

    @property
    def key(self) -> str:
        return self.word.split("=")[0]


def refused(word: str, line: str, *given: str) -> Wire:
    return Wire(word, set(), given, refused=line)


def view(word: str, value: object, *given: str) -> Wire:
    """Of data.augment: it says how views are made, and so all that is learnt from them."""
    name = "view's " + word.split("=")[0].removeprefix("data.augment.")
    return Wire(word, {name} | SEEN, given, {name: value})


WIRES = (
    Wire("name=007", PLACES, shows={"run's place": ["runs/007"]}),
    Wire("seed=3", {"first weights", "dropout's seed"} | ORDER, shows={"dropout's seed": 3}),
    Wire("data.root=others", {"pictures"} | ORDER),
    Wire(
        "data.train=others/train",
        {"pictures"} | ORDER,
        shows={"pictures": {"train": 15, "valid": 6, "test": 6}},
    ),
    Wire(
        "data.valid=others/valid",
        {"pictures"} | SCORES - {"test's figures"},
        shows={"pictures": {"train": 12, "valid": 9, "test": 6}},
    ),
    Wire(
        "data.test=others/valid",
        {"pictures", "test's figures", "reported"},
        shows={"pictures": {"train": 12, "valid": 6, "test": 9}},
    ),
    Wire(  # a table in which valid and test are swapped
        "data.labels=labels.csv",
        {"pictures"} | SCORES,
        ("data.root=others",),
        {"pictures": {"train": 15, "valid": 6, "test": 9}},
    ),
    Wire(
        "data.valid_fraction=0.5",
        {"pictures", "checkpoints"} | RATES | ORDER,
        ("data.root=unsplit",),
        {"pictures": {"train": 6, "valid": 6, "test": 6}},
    ),
    refused("data.max_broken=0.01", "1 of 24 pictures can't be used", "data.root=broken"),
    Wire("data.leaks=drop", {"test's figures", "reported"}, ("data.root=leaky",)),
    refused("data.leaks=stop", "data.leaks=stop: ", "data.root=leaky"),
    Wire("data.resize=16", {"preprocessing"} | SEEN),
    Wire("data.size=14", {"preprocessing"} | SEEN),
    Wire("data.interpolation=box", {"preprocessing"} | SEEN),
    Wire("data.workers=2", {"reading threads"}, shows={"reading threads": 2}),
    Wire("data.cache=none", {"pixels kept"}, shows={"pixels kept": False}),
    Wire("data.cache_gb=1e-9", {"pixels kept"}, shows={"pixels kept": False}),
    view("data.augment.scale=[0.1,0.2]", [0.1, 0.2]),
    view("data.augment.ratio=[0.3,0.4]", [0.3, 0.4]),
    view("data.augment.flip=false", False),
    view("data.augment.vertical_flip=true", True),
    view("data.augment.rotation=90", 90),
    view("data.augment.jitter=[0.5,0,0,0]", [0.5, 0, 0, 0]),
    view("data.augment.randaugment=2", 2),
    view("data.augment.magnitude=30", 30, "data.augment.randaugment=2"),
    view("data.augment.trivial=true", True),
    view("data.augment.erasing=1", 1),
    # mixup blends pixels, CutMix copies them
    Wire("data.augment.mixup=1", {"blended", "inputs"} | LEARNT, shows={"blended": True}),
    Wire("data.augment.cutmix=1", {"inputs"} | LEARNT, shows={"blended": False}),
    Wire(
        "model.weights=start.pth",
        {"first weights", "rates"} | LEARNT,
        ("model.freeze=none",),
    ),
    Wire("model.freeze=backbone", {"rates", "files"} | SEEN, PRETRAINED, {"rates": [[]] * 6}),
    Wire("model.head_hidden=8", {"first weights", "head"} | LEARNT),
    Wire("model.cached_views=1", {"pixels kept", "files"} | VIEW | SEEN - {"means"}, HEAD),  # plain
    Wire("model.unfreeze_epochs=1", {"rates"} | LEARNT, PRETRAINED),
    Wire("model.norm_stats=update", LEARNT, PRETRAINED),
    Wire("model.mean=[0.25,0.5,0.75]", {"mean"} | LEARNT, shows={"mean": [0.25, 0.5, 0.75]}),
    Wire("model.std=[0.25,0.5,0.75]", {"std"} | LEARNT, shows={"std": [0.25, 0.5, 0.75]}),
    Wire("optim.name=sgd", {"optimizer", "momentum"} | RATES | LEARNT, shows={"optimizer": "SGD"}),
    Wire("optim.lr=0.01", RATES | LEARNT),
    Wire("optim.head_lr=0.01", {"head's rates"} | LEARNT),
    Wire("optim.layer_decay=0.5", {"rates"} | LEARNT, PRETRAINED),
    Wire("optim.weight_decay=0.9", {"decay"} | LEARNT, shows={"decay": [0.0, 0.9]}),
    Wire("optim.momentum=0.5", {"momentum"} | LEARNT, ("optim.name=sgd",), {"momentum": [0.5]}),
    Wire("optim.schedule=constant", RATES | LEARNT),
    Wire("optim.warmup_epochs=0", RATES | LEARNT),
    Wire("optim.step_epochs=1", RATES | LEARNT, ("optim.schedule=step",)),
    Wire(
        "optim.step_factor=0.5", RATES | LEARNT, ("optim.schedule=step", "optim.step_epochs=1")
    ),
    Wire(
        "train.epochs=3",
        {"epochs", "checkpoints"} | RATES | ORDER,
        shows={"epochs": 3},
    ),
    Wire(
        "train.batch_size=6",
        {"microbatches", "checkpoints"} | RATES | ORDER,
        shows={"microbatches": [6]},
    ),
    Wire(
        "train.accumulate=2", {"microbatches", "inputs"} | LEARNT, shows={"microbatches": [2]}
    ),
    Wire("train.label_smoothing=0", LEARNT),
    Wire("train.clip_norm=1e-3", LEARNT),
    Wire("train.imbalance=sampler", ORDER),
    Wire("train.imbalance=logits", LEARNT),
    Wire("train.tta=flip", {"mirrored too"} | SCORES),
    Wire("train.ema_decay=null", KEPT),
    Wire("train.ema_decay=1e-9", KEPT),
    Wire("train.monitor=valid_top1", {"best epoch"} | KEPT - {"valid's figures"}),
    Wire(
        "train.patience=1",
        {"epochs", "checkpoints"},
        ("train.epochs=4", "optim.lr=100"),
        may=RATES | ORDER | {"best epoch"},
    ),
    refused("train.device=mps", "train.device=mps: "),
    Wire(
        "train.precision=bf16", {"precision"} | LEARNT, shows={"precision": "torch.bfloat16"}
    ),
    Wire("train.channels_last=false", {"memory order"}, may=LEARNT),
    Wire("train.deterministic=false", {"deterministic"}),
    Wire("train.threads=2", {"threads"}, shows={"threads": 2}, may=LEARNT),
    Wire(
        "train.exact_shards=2", {"shards", "microbatches", "inputs"} | LEARNT,
        shows={"shards": [0, 1]},
    ),
    refused("train.processes=2", "train.processes=2, but 1 runs"),
    refused("train.hosts=2", "train.hosts=2, but the processes run on 1"),
    Wire(
        "train.timeout_seconds=100", {"patience with others"}, shows={"patience with others": 100}
    ),
    Wire("checkpoint.minutes=100", {"minutes between checkpoints"}),
    Wire("checkpoint.max_cost=0.5", {"checkpoints' cost"}, shows={"checkpoints' cost": 0.5}),
    Wire("checkpoint.keep=3", {"checkpoints"}, ("train.epochs=3",)),
    Wire("package.int8=true", {"pictures for int8", "int8's limit"}),
    Wire(
        "package.max_drop=1", {"int8's limit"}, ("package.int8=true",), {"int8's limit": 1}
    ),
    Wire("platform.runs=there", PLACES, shows={"run's place": ["there/run"]}),
    Wire("platform.run_dir=there", PLACES, shows={"run's place": ["there"]}),
    Wire(
        "platform.checkpoints=there",
        {"checkpoints' place"},
        shows={"checkpoints' place": ["there"]},
    ),
    Wire(
        "platform.package=there/model.tar.gz",
        {"package's place"},
        shows={"package's place": ["there"]},
    ),
    Wire("platform.cache=there", {"cache's place"}, shows={"cache's place": ["there/digests"]}),
    Wire("platform.dollars_hour=2", {"price"}, shows={"price": 2}),
)  # fmt: skip


def test_each_setting_has_a_wire_or_is_named_elsewhere():
    searched = {word.split("=")[0] for words in SWEEPS.values() for word in words}
    others = {key for key in searched if key.startswith("sweep.")} | ELSEWHERE.keys() | ALWAYS
    untold = set(settings.keys()) - others - {wire.key for wire in WIRES}
    assert not untold, f"say in WIRES what these change, and where it is seen: {sorted(untold)}"
    assert others <= set(settings.keys()), "no such settings"


def make_fixtures(root: Path) -> None:
    """Fill a folder with all that the runs read."""
    pictures = make_pictures(root / "pictures", {"train": 5, "valid": 2, "test": 2})
    for one_of_few in ("square/004", "stripe/004", "stripe/003"):
        (pictures / "train" / f"{one_of_few}.png").unlink()
    make_pictures(root / "others", {"train": 5, "valid": 3, "test": 2}, size=18)
    for other in ("unsplit", "broken", "leaky"):
        shutil.copytree(pictures, root / other)
    shutil.rmtree(root / "unsplit/valid")
    (root / "broken/train/circle/000.png").write_bytes(b"no picture")
    shutil.copy(root / "leaky/train/circle/000.png", root / "leaky/test/circle/001.png")
    swapped = {"train": "train", "valid": "test", "test": "valid"}
    places = [path.relative_to(root / "others") for path in (root / "others").rglob("*.png")]
    table = "".join(f"{path},{path.parts[1]},{swapped[path.parts[0]]}\n" for path in places)
    (root / "others/labels.csv").write_text(f"path,label,split\n{table}")
    torch.manual_seed(1)
    torch.save(build("small_cnn", 3).backbone.state_dict(), root / "start.pth")


def observe(root: Path, wires: Iterable[Wire]) -> None:
    """Write to facts.json what the runs of these do, each once."""
    fixtures = root / "fixtures"
    make_fixtures(fixtures)
    runs = dict.fromkeys(each for wire in wires for each in (wire.given, (*wire.given, wire.word)))
    (root / "specs.json").write_text(json.dumps([str(fixtures), BEGIN, [*runs]]))
    command = ["tests.trainer.settings.wiring", "specs.json", "facts.json"]
    code, said = ended(start(root, command, environment(root)))
    assert code == OK, said
    facts = json.loads((root / "facts.json").read_text())
    (root / "facts.json").write_text(json.dumps([*zip(runs, facts, strict=True)]))


@pytest.fixture(scope="module")
def facts(
    tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest
) -> dict[tuple[str, ...], dict[str, Any]]:
    """What each run that is asked for does, by the words that it has more than others."""
    calls = [getattr(test, "callspec", None) for test in request.session.items]
    wires = [call.params["wire"] for call in calls if call and "wire" in call.params]
    root = made_once(tmp_path_factory, "wiring", lambda root: observe(root, wires))
    return {tuple(words): each for words, each in json.loads((root / "facts.json").read_text())}


@pytest.mark.parametrize("wire", WIRES, ids=lambda wire: wire.word)
def test_a_setting_acts_where_it_should_and_nowhere_else(facts, wire):
    before, after = facts[wire.given], facts[*wire.given, wire.word]
    if wire.refused:
        assert after["ends"].startswith(wire.refused)
        assert before["ends"] == ""
        return
    assert before["ends"] == after["ends"] == ""
    names = before.keys() | after.keys()
    differs = {name for name in names if before.get(name) != after.get(name)}
    assert wire.differs <= differs, f"{wire.word} has no effect on {wire.differs - differs}"
    may = wire.may | {"said"}
    if "valid's figures" in wire.differs:
        may.add("best epoch")  # which they choose
    others = differs - wire.differs - may
    assert not others, f"{wire.word} changes {others} too"
    assert {name: after[name] for name in wire.shows} == wire.shows
