"""What the tests' Hydra remembers is what Hydra composes."""

import shutil
from typing import Any

import hydra
import pytest
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from omegaconf import DictConfig, OmegaConf

from tests import composed_once
from trainer.settings import config as settings
from trainer.settings.compose import CONF, compose

WORDS = [
    "",
    "train.epochs=3 data=folder model=resnet50 data.augment.scale=[0.5,1] train.epochs=4",
    "experiment=dog_breeds optim.name=sgd",
    "sweep=lists model=small_cnn model=resnet50",
    # more than KEY=VALUE
    "+experiment=dog_breeds train.epochs=2",
    "++name=a hydra.verbose=true",
    "data={root: /x}",
    # refused
    "~optim",
    "optim.lr=1,2",
    "model=small_cnn,resnet50",
    "model=nothing",
    "no.such=1",
    "data@other=folder",
    "optim.lr=[",
]


def composed(*words: str) -> object:
    """All that a reader of the settings sees, or how they are refused."""
    try:
        with hydra.initialize_config_dir(str(CONF), version_base="1.3"):
            result = hydra.compose("config", [*words], return_hydra_config=True)
        OmegaConf.set_struct(result, False)
    except Exception as error:
        return type(error), str(error), str(error.__cause__)
    of_hydra = result.pop("hydra")
    return dict(of_hydra.runtime.choices), of_hydra.verbose, nodes(result)


def nodes(node: Any) -> object:
    """The values, none of them resolved, and what OmegaConf notes of each: its type, its flags."""
    value = node._value()
    if isinstance(node, DictConfig):
        value = {key: nodes(node._get_node(key)) for key in node}
    return value, vars(node._metadata) | {"resolver_cache": None}


@pytest.fixture(autouse=True)
def registered() -> None:
    settings.register()


@pytest.mark.parametrize("words", WORDS)
def test_what_is_remembered_is_what_hydra_composes(monkeypatch, words):
    composed(*words.split())
    again = composed(*words.split())
    monkeypatch.setattr(ConfigLoaderImpl, "_load_configuration_impl", composed_once.HYDRAS_OWN)
    assert again == composed(*words.split())


def test_it_is_composed_once(monkeypatch, tmp_path):
    conf = shutil.copytree(CONF, tmp_path / "conf")
    words = ["model=small_cnn", "train.epochs=3"]
    assert compose(words, conf).train.epochs == 3
    monkeypatch.setattr(composed_once, "HYDRAS_OWN", None)
    assert compose([*words, "seed=4", "train.epochs=5"], conf).train.epochs == 5
    monkeypatch.undo()
    optim = conf / "optim/adamw.yaml"
    optim.write_text(optim.read_text().replace("adamw", "sgd"))
    assert compose(words, conf).optim.name == "sgd"
    assert compose(words, conf).platform.name == "local"
    monkeypatch.setenv("SM_MODEL_DIR", str(tmp_path))
    assert compose(words, conf).platform.name == "sagemaker"
