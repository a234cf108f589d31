"""What the words of a command line mean beyond what they say, the same for every command."""

import json

import pytest

from launch.cloud import hyperparameters as codec
from launch.local.container_entry import overrides
from launch.targets import sagemaker
from tests.conftest import QUICK, make_pictures, run_trainer
from tests.launch.targets.test_sagemaker import make_spec
from trainer.common.errors import MISTAKE, OK, UserError
from trainer.images.datasets import find_images
from trainer.settings.compose import resolve
from trainer.settings.config import identity, run_name

OWN = "data.root=pictures"

# A command line: the data, the model and whether it begins with weights.
MEANT = {
    "": ("fashion_mnist", "small_cnn", False),
    "data=fashion_mnist data.root=elsewhere": ("fashion_mnist", "small_cnn", False),
    OWN: ("folder", "auto", True),
    "data.train=pictures/train": ("folder", "auto", True),
    "data=folder data.train=pictures/train": ("folder", "auto", True),
    "data=pets": ("pets", "auto", True),
    f"{OWN} model=small_cnn": ("folder", "small_cnn", False),
    f"{OWN} model.name=small_cnn": ("folder", "small_cnn", False),
    f"{OWN} model.name=resnet18": ("folder", "resnet18", True),
    f"{OWN} model.name=timm/resnet18": ("folder", "timm/resnet18", True),
    f"{OWN} model.name=resnet18 model.weights=null": ("folder", "resnet18", False),
    "model.name=resnet18": ("fashion_mnist", "resnet18", True),
    f"experiment=dog_breeds {OWN}": ("folder", "resnet50", True),
    f"experiment=dog_breeds model=mobilenet_v2 model.weights=DEFAULT {OWN}": (
        "folder",
        "mobilenet_v2",
        True,
    ),
}


@pytest.mark.parametrize("words", MEANT)
def test_a_folder_is_for_a_pretrained_network_and_a_name_brings_its_weights(configure, words):
    config = configure(*words.split())
    assert (config.data.source, config.model.name, config.model.weights is not None) == MEANT[words]


@pytest.mark.parametrize("words", MEANT)
def test_what_is_meant_means_the_same_once_more(configure, words):
    config = configure(*words.split())
    again = resolve(resolve(words.split()).words)
    assert identity(configure(*again.words)) == identity(config) and run_name(
        configure(*again.words)
    ) == run_name(config)


def test_an_experiment_that_chooses_is_not_overruled(configure):
    resolved = resolve(["experiment=dog_breeds", OWN])
    assert resolved.words == ["experiment=dog_breeds", OWN] and resolved.notes == []


def test_a_setting_that_is_given_twice_says_which_counts():
    (note,) = resolve(["optim.lr=1", "seed=1", "optim.lr=2"]).notes
    assert note == "optim.lr is given 2 times: optim.lr=2 counts"


@pytest.mark.parametrize(
    "words",
    [
        [OWN],
        [OWN, "model.name=resnet18"],
        ["data=folder", OWN],
        ["experiment=dog_breeds", OWN],
        ["optim.lr=1e-3"],
    ],
)
def test_a_job_trains_what_its_words_mean_here(tmp_path, configure, words):
    spec = make_spec(*words)
    job = sagemaker.training_job(spec).parameters
    (tmp_path / "hyperparameters.json").write_text(json.dumps(job["HyperParameters"]))
    channels = [channel["ChannelName"] for channel in job.get("InputDataConfig", [])]
    places = {f"SM_CHANNEL_{name.upper()}": str(tmp_path) for name in channels}
    typed = overrides(
        {"SM_INPUT_CONFIG_DIR": str(tmp_path), "SM_CHANNELS": json.dumps(channels), **places}
    )
    assert identity(configure(*typed)) == identity(spec.config) == identity(configure(*words))
    assert set(codec.decode(job["HyperParameters"])) == set(words) - {OWN}


def test_what_was_not_said_is_said(tmp_path):
    make_pictures(tmp_path / "pictures", {"train": 8, "valid": 3})
    quick = [setting for setting in QUICK if not setting.startswith("train.epochs")]
    code, output = run_trainer(tmp_path, OWN, "model.name=small_cnn", *quick, "train.epochs=1")
    assert code == OK, output
    assert (
        "data=folder: " in output
        and "model=small_cnn: " in output
        and "\nmodel: small_cnn, from scratch, " in output
    )
    offline = {"TORCH_HOME": "torch", "https_proxy": "http://127.0.0.1:9"}
    given = "model.candidates=[resnet18,mobilenet_v2]"
    code, output = run_trainer(tmp_path, OWN, given, *quick, "train.epochs=1", **offline)
    assert code == OK, output
    assert "left out: resnet18: " in output and "left out: mobilenet_v2: " in output
    assert "small_cnn is trained from scratch" in output and "model.weights_dir=DIR" in output
    code, output = run_trainer(tmp_path, OWN, "model.name=resnet18", **offline)
    assert code == MISTAKE and "model.weights=FILE" in output.splitlines()[-1], output


def test_pictures_that_are_not_there_are_not_made(tmp_path):
    code, output = run_trainer(tmp_path, "data.root=nowhere", "model=small_cnn")
    assert code == MISTAKE and "data.root=nowhere: there is no such folder" in output
    assert not (tmp_path / "nowhere").exists()


# --- what the folders of the splits are called ---


@pytest.mark.parametrize(
    ("train", "valid", "test"),
    [("train", "val", "Test"), ("Train", "Valid", "testing"), ("training", "VALIDATION", "test")],
)
def test_a_split_is_known_by_its_usual_names(tmp_path, configure, train, valid, test):
    make_pictures(tmp_path, {train: 5, valid: 3, test: 2})
    found = find_images(configure("data=folder", f"data.root={tmp_path}"))
    assert {name: len(split.paths) for name, split in found.splits.items()} == {
        "train": 15,
        "valid": 9,
        "test": 6,
    }


def test_two_names_for_one_split_are_refused_and_a_given_folder_wins(tmp_path, configure):
    make_pictures(tmp_path, {"train": 5, "val": 3, "valid": 2})
    with pytest.raises(UserError, match=r"two folders for valid, val and valid: .*data.valid="):
        find_images(configure("data=folder", f"data.root={tmp_path}"))
    found = find_images(
        configure("data=folder", f"data.root={tmp_path}", f"data.valid={tmp_path}/val")
    )
    assert len(found.splits["valid"].paths) == 9


def test_a_folder_of_pictures_that_nobody_uses_is_named(tmp_path, configure, caplog, monkeypatch):
    monkeypatch.setattr("trainer.common.console.log.propagate", True)
    make_pictures(tmp_path, {"train": 5, "dev": 3, "holdout": 3})
    (tmp_path / "labels").mkdir()  # without pictures
    find_images(configure("data=folder", f"data.root={tmp_path}"))
    (line,) = [line for line in caplog.messages if "not used" in line]
    assert "dev, holdout" in line and "labels" not in line and "data.valid=DIR" in line
    caplog.clear()
    find_images(
        configure(
            "data=folder",
            f"data.root={tmp_path}",
            f"data.valid={tmp_path}/dev",
            f"data.test={tmp_path}/holdout",
        )
    )
    assert "not used" not in caplog.text


def test_two_channels_for_one_split_are_refused(tmp_path):
    (tmp_path / "hyperparameters.json").write_text("{}")
    places = {"SM_CHANNEL_VAL": str(tmp_path), "SM_CHANNEL_VALID": str(tmp_path)}
    with pytest.raises(UserError, match=r"channels val and valid: both would be data.valid"):
        overrides(
            {"SM_INPUT_CONFIG_DIR": str(tmp_path), "SM_CHANNELS": '["val", "valid"]', **places}
        )
