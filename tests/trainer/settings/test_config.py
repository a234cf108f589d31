import re

import pytest

from tests.conftest import PROJECT, refusal, run_trainer
from trainer.common.errors import MISTAKE
from trainer.common.paths import user_cache
from trainer.settings import config as settings
from trainer.settings.config import (
    METRICS,
    Config,
    ignored,
    metric_definitions,
    metric_line,
    run_name,
)

YAML = sorted((PROJECT / "conf").rglob("*.yaml"))


@pytest.mark.parametrize("path", YAML, ids=lambda path: str(path.relative_to(PROJECT)))
def test_every_setting_in_conf_is_commented(path):
    lines = path.read_text().split("\nhydra:")[0].splitlines()
    assert lines[0].startswith("#")
    for line in lines:
        if re.match(r"\s*\w+: *[^ ]", line) and not line.startswith("defaults:"):
            assert "  #" in line, line


@pytest.mark.parametrize("group", ["data", "model", "optim", "platform", "experiment"])
def test_every_option_of_every_group_composes(group, configure):
    for path in sorted((PROJECT / "conf" / group).glob("*.yaml")):
        given = ["data.root=somewhere"] if group in ("data", "experiment") else []
        given += ["model.name=resnet18"] if path.stem == "torchvision" else []
        given += ["model.code=own.py"] if path.stem == "own" else []
        assert isinstance(configure(f"{group}={path.stem}", *given), Config)


def test_conf_gives_every_setting_of_the_schema(configure):
    assert {key for key, _, _ in settings.walk(configure())} == set(settings.keys())


MISTAKES = {
    "optim.lrr=1": ["optim.lrr", "did you mean optim.lr"],
    "epochs=3": ["epochs", "train.epochs"],
    "train.epoch=3": ["train.epoch", "did you mean train.epochs"],
    "optim.lr=fast": ["optim.lr=fast", "float"],
    "train.epochs=2.5": ["train.epochs=2.5", "integer"],
    "train.batch_size=null": ["train.batch_size=null", "not allowed"],
    "train.compile=maybe": ["train.compile=maybe", "boolean"],
    "train.epochs=0": ["train.epochs=0", "train.epochs=1 or more", "model.head=probe"],
    "optim.lr=-1": ["optim.lr=-1", "above 0"],
    "optim.lr=nan": ["optim.lr=nan", "above 0"],
    "optim.name=lion": ["optim.name=lion", "adamw, sgd"],
    "data.interpolation=nearest": ["nearest", "bilinear"],
    "model.mean=[0.5]": ["model.mean", "exactly 3"],
    "data.augment.scale=[0.9,0.1]": ["data.augment.scale", "lower bound"],
    "data.augment.scale=[0,1]": ["data.augment.scale", "above 0"],
    "data.augment.jitter=[0,0,0,0.6]": ["data.augment.jitter", "hue", "at most 0.5"],
    "data.augment.jitter=[0.4]": ["data.augment.jitter", "exactly 4"],
    "model.unfreeze_epochs=3 train.epochs=3": [
        "model.unfreeze_epochs=3",
        "fewer than train.epochs",
    ],
    "model.unfreeze_epochs=16": ["model.unfreeze_epochs=16", "train.epochs=16"],
    "train.imbalance=weights": ["train.imbalance=weights", "none, sampler, logits"],
    "data.resize=16": ["data.size=28", "data.resize=16"],
    "train.accumulate=100": ["train.accumulate=100", "train.batch_size=64"],
    "model=resnet18": ["model=resnet18", "resnet50", "model=torchvision model.name=resnet18"],
    "optim=lion": ["optim=lion", "adamw, sgd"],
    "data=folder": ["data.root", "give data.root="],
    "experiment=dog_bread": ["experiment=dog_bread", "did you mean dog_breeds?"],
    "experiment=": ["experiment=", "dog_breeds"],
    "platform=ec3": ["platform=ec3", "did you mean ec2?"],
    "+optim.eps=1e-8": ["optim.eps: there is no such setting"],
    "++train.epohs=50": ["train.epohs: there is no such setting", "did you mean train.epochs"],
    "+anything=1": ["anything: there is no such setting"],
    "+model=resnet50": ["+model=resnet50", "give model=resnet50"],
    "~optim.lr": ["~optim.lr", "optim.lr=VALUE"],
    "~train": ["~train", "can't be taken away"],
    "optim=null": ["optim=null", "adamw, sgd"],
    "train=null": ["train=null", "train.epochs=..."],
    "data.augment=5": ["data.augment=5", "data.augment.scale=..."],
    "model.mean=0.5": ["model.mean=0.5", "a list"],
    "model.mean=[nan,1,1]": ["model.mean", "at least 0 and at most 1"],
    "optim.lr=inf": ["optim.lr=inf", "above 0 and at most"],
    "seed=18446744073709551616": ["seed=18446744073709551616", "at most 18446744073709551615"],
    "data.root=${oc.env:NO_SUCH_NAME}": ["data.root", "NO_SUCH_NAME"],
    "model=small_cnn model.name=resnet18": [
        "model=small_cnn with model.name=resnet18",
        "give model=torchvision model.name=resnet18",
    ],
    "train.batch_size=[": ["train.batch_size=["],
    "train.batch_size": ["train.batch_size", "="],
}


@pytest.mark.parametrize("override", MISTAKES)
def test_a_wrong_setting_is_one_line_with_key_value_and_what_is_allowed(override):
    line = refusal(*override.split())
    assert line is not None and "\n" not in line
    for part in MISTAKES[override]:
        assert part in line


@pytest.mark.parametrize("override", ["optim.lr=inf", "experiment=dog_bread", "optim=null"])
def test_it_is_all_that_is_said_before_any_data_is_read_or_any_directory_made(override, tmp_path):
    code, output = run_trainer(tmp_path, override)
    assert code == MISTAKE and output.startswith("error: ") and output.count("\n") == 1, output
    made = [str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*")]
    assert set(made) <= {".cache", ".cache/packhorse", ".cache/packhorse/exports"}  # of the tests


def test_ignored_settings_are_named(configure):
    assert "optim.momentum" in ignored(configure("optim.momentum=0.8"), ["optim.momentum=0.8"])[0]
    assert (
        ignored(configure("optim=sgd", "optim.momentum=0.8"), ["optim=sgd", "optim.momentum=0.8"])
        == []
    )
    assert ignored(configure(), []) == []
    words = ["data.augment.magnitude=5", "data.augment.randaugment=2"]
    assert ignored(configure(*words), words) == []
    assert ignored(configure(*words[:1]), words[:1]) == [
        "data.augment.magnitude=5 has no effect with data.augment.randaugment=0: "
        "it is used with data.augment.randaugment!=0"
    ]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("sweep.trials=5", "sweep.trials: no effect in one run; a sweep is started with -m"),
        ("platform.runs=a platform.run_dir=b", "platform.runs=a has no effect"),
        ("model.freeze=backbone optim.lr=1 optim.head_lr=2", "optim.lr=1.0 has no effect"),
    ],
)
def test_a_word_without_effect_is_said_before_anything_is_read(configure, words, said):
    typed = words.split()
    assert said in "\n".join(ignored(configure(*typed), typed))


def test_a_sweep_says_which_of_its_settings_its_engine_ignores(configure):
    typed = ["sweep.trials=5", "sweep.points=3"]
    (line,) = ignored(configure(*typed), typed, sweep=True)
    assert line.startswith("sweep.trials=5 has no effect with sweep.engine=grid")
    typed = ["sweep.engine=optuna", *typed]
    (line,) = ignored(configure(*typed), typed, sweep=True)
    assert line.startswith("sweep.points=3 has no effect with sweep.engine=optuna")


def test_the_same_settings_find_the_same_run_and_others_another(configure):
    assert run_name(configure()) == run_name(configure("data.workers=3", "checkpoint.minutes=1"))
    assert run_name(configure()) != run_name(configure("optim.lr=0.1"))
    assert run_name(configure()) != run_name(configure("data.root=elsewhere"))
    assert run_name(configure("name=mine", "optim.lr=0.1")) == "mine"


def test_every_metric_of_the_line_is_found_by_its_own_regex_alone():
    values = {name: float(number) + 0.25 for number, name in enumerate(METRICS)}
    line = metric_line(values)
    for definition in metric_definitions():
        found = re.findall(definition["Regex"], line)
        assert len(found) == 1
        assert float(found[0]) == values[definition["Name"]]
        assert re.compile(definition["Regex"]).groups == 1


@pytest.mark.parametrize("value", [1e-7, 123456.0, float("nan"), float("inf")])
def test_the_regex_takes_any_number_that_the_line_prints(value):
    line = metric_line({"valid_loss": value})
    regex = {definition["Name"]: definition["Regex"] for definition in metric_definitions()}[
        "valid_loss"
    ]
    assert str(float(re.findall(regex, line)[0])) == str(value)


def test_the_platform_is_found_from_the_environment(configure, monkeypatch):
    assert configure().platform.name == "local"
    monkeypatch.setenv("SM_MODEL_DIR", "/opt/ml/model")
    assert configure().platform.name == "sagemaker"
    assert configure("platform=local").platform.name == "local"


def test_the_cache_is_known_alike_to_hydra_and_to_commands_without_it(configure):
    assert configure("platform=local").platform.cache == str(user_cache())
