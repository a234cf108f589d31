"""The one way from the words of a command line to the settings of a run.

Every command composes here, so the same words mean the same everywhere.
"""

import shlex
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import hydra
from omegaconf import DictConfig, OmegaConf, open_dict

from trainer.common import model_package
from trainer.common.errors import UserError
from trainer.common.paths import expanded
from trainer.settings import config as settings
from trainer.settings import search_space as space
from trainer.settings.config import AUTO, DEMO, TOY, Config
from trainer.settings.hydra_errors import (
    CONFIG_ERRORS,
    explain,
    several_values,
    unknown_key,
    unknown_option,
)
from trainer.settings.words import key_of, override, readable, text

CONF = Path(__file__).parents[2] / "conf"
OWN = {"data.root", "data.train", "data.labels"}  # each names images of a person's own
# Hydra's own ways to say where a run lies and how a sweep is driven.
HYDRAS_PLACES = (
    "hydra.run", "hydra.sweep", "hydra.mode", "hydra.output_subdir", "hydra.launcher",
    "hydra/launcher", "hydra/sweeper",
)  # fmt: skip
GROUPS = ("data", "model", "optim", "platform", "sweep", "experiment")


@dataclass(frozen=True)
class Resolved:
    """What a command line means.

    words: the overrides that Hydra gets: those that were typed, as it can read them, after those
    that they imply. notes: one line for each thing that was not said. composed: what Hydra makes of
    the words.
    """

    words: list[str]
    notes: list[str]
    composed: DictConfig


def compose(words: Sequence[str], conf: Path = CONF) -> Config:
    """Return the settings that overrides mean.

    Raise UserError, and Hydra's own errors (trainer/settings/hydra_errors.py).
    """
    return settings.load(resolve(words, conf).composed)


def resolve(words: Sequence[str], conf: Path = CONF) -> Resolved:
    """Return what overrides mean and don't say; its words mean the same when resolved once more.

    Raise UserError for an override that has no effect or another one than it says, and Hydra's own
    errors.
    """
    check(words, settings.keys(), {group: options(conf, group) for group in GROUPS})
    given = {key_of(word) for word in words}
    words, notes = readable(words), _given_twice(words)
    composed, choices = _compose(words, conf)
    for rule in (_own_pictures, _root_of_train, _network_of_package, _model_by_name):
        implied = rule(given, composed, choices)
        if implied:
            word, reason = implied
            words.insert(0, word)
            given.add(key_of(word))
            notes.append(f"{word}: {reason}")
            composed, choices = _compose(words, conf)
    from_nothing = choices["model"] == TOY and composed.model.weights is None
    if from_nothing and choices["data"] != DEMO and composed.data.size is None:
        notes.append(
            f"model={TOY}: it starts from random weights, with pictures of "
            f"{settings.PLAIN.size} px; data.size=64 is many times faster"
        )
    return Resolved(words, notes, composed)


def _given_twice(words: Sequence[str]) -> list[str]:
    """Return a note for each setting that is given more than once."""
    last = {key_of(word): word for word in words}
    counts = Counter(map(key_of, words))
    return [
        f"{key} is given {count} times: {last[key]} counts"
        for key, count in counts.items()
        if count > 1
    ]


def first_trial(fixed: Sequence[str], swept: Mapping[str, str], conf: Path = CONF) -> list[str]:
    """Return the overrides that a sweep begins with: its lists stand at their first values.

    Of the space in conf/, only a setting that has no other value takes its first one. Raise as
    `resolve`.
    """
    words = [*fixed, *space.firsts(swept)]
    composed = resolve(words, conf).composed
    needed = {
        key: ranges for key, ranges in composed.sweep.space.items() if _is_missing(composed, key)
    }
    return [*words, *space.firsts(needed)]


def _is_missing(composed: DictConfig, key: str) -> bool:
    section, _, name = key.rpartition(".")
    node = OmegaConf.select(composed, section)
    return node is not None and OmegaConf.is_missing(node, name)


def check_options(sweep: space.Sweep, fixed: Sequence[str], swept: Mapping[str, str]) -> None:
    """Check the options in a sweep's space.

    Raise UserError, or an error of Hydra's, for one that there is not, or that doesn't fit the
    sweep's other settings.
    """
    for parameter in sweep.space:
        if parameter.key in space.GROUPS:
            assert isinstance(parameter, space.Categorical)
            for choice in parameter.choices:
                compose([*fixed, *space.firsts({**swept, parameter.key: text(choice)})])


def options(conf: Path, group: str) -> list[str]:
    """List the options of a config group."""
    return sorted(path.stem for path in (conf / group).glob("*.yaml"))


def _compose(words: Sequence[str], conf: Path) -> tuple[DictConfig, dict[str, str]]:
    """Return what Hydra composes, and the option that it took of each group."""
    with hydra.initialize_config_dir(str(conf.absolute()), version_base="1.3"):
        composed = hydra.compose("config", list(words), return_hydra_config=True)
    choices = dict(composed.hydra.runtime.choices)
    with open_dict(composed):
        del composed["hydra"]
    return composed, choices


# --- what is meant and not said: each rule gives an override and its reason, or None ---


def _own_pictures(
    given: set[str], composed: DictConfig, choices: dict[str, str]
) -> tuple[str, str] | None:
    """Choose data=folder where a folder of images, or a table of them, is given without data=...

    It means these images, and is not a place for the demo's.
    """
    if "data" in given or choices["data"] != DEMO or not given & OWN:
        return None
    data = composed.data
    where = data.train or data.root
    if "data.root" not in given:
        where = data.train or data.labels
    return "data=folder", f"the pictures in {where} are your own"


def _root_of_train(
    given: set[str], composed: DictConfig, choices: dict[str, str]
) -> tuple[str, str] | None:
    """Fill in data.root where only a folder of training images or a table of labels is given.

    valid is split off it, unless data.valid or the table says where it is.
    """
    data = composed.data
    if not OmegaConf.is_missing(data, "root"):
        return None
    if data.train is not None:
        (word,) = readable([override("data.root", data.train)])
        return word, "only data.train was given"
    if data.labels is not None:
        (word,) = readable([override("data.root", str(Path(data.labels).parent))])
        return word, "only data.labels was given"
    return None


def _network_of_package(
    given: set[str], composed: DictConfig, choices: dict[str, str]
) -> tuple[str, str] | None:
    """Choose the network that one of our packages, or a run, holds, where only that is given."""
    weights = composed.model.weights
    if "model.weights" not in given or weights is None or given & {"model", "model.name"}:
        return None
    path = expanded(str(weights))
    if not Path(path).exists() or not model_package.is_package(path):
        return None  # a job on another machine has it, perhaps
    name = model_package.manifest(path)["config"]["model.name"]
    return override("model.name", name), f"the network of model.weights={weights}"


def _model_by_name(
    given: set[str], composed: DictConfig, choices: dict[str, str]
) -> tuple[str, str] | None:
    """Choose the settings that go with a model's name.

    A pretrained network must not get the toy's, and random weights with them.
    """
    if OmegaConf.is_missing(composed.model, "name"):
        return None
    name, choice = composed.model.name, choices["model"]
    named = (AUTO, TOY, settings.OWN)
    if choice == name or (name not in named and choice not in named):
        return None
    option, instead = "torchvision", f"model=torchvision model.name={name}"
    reason = f"the settings that go with {name}"
    if name in named:
        option, instead = name, f"model={name} alone"
    elif "model.weights" not in given:
        reason += ", with its own pretrained weights"
    if "model" in given:
        raise UserError(
            f"model={choice} with model.name={name}: these are two models; give {instead}"
        )
    return f"model={option}", reason


# --- overrides that Hydra takes, though nothing good comes of them ---


def check(words: Sequence[str], keys: list[str], groups: dict[str, list[str]]) -> None:
    """Raise UserError for an override that takes a setting away, or replaces several at once.

    keys: every dotted key that there is. groups: the options of each config group.
    """
    sections = {key.rsplit(".", depth)[0] for key in keys for depth in range(1, key.count(".") + 1)}
    for word in words:
        key, value = key_of(word), word.partition("=")[2].strip()
        if word.startswith("~"):
            _check_deletion(word, key, keys, {*sections, *groups})
        elif key in groups:
            _check_option(word, key, value, groups[key])
        elif key in sections and not value.startswith("{"):
            inside = [name for name in keys if name.startswith(f"{key}.")]
            raise UserError(
                f"{word}: {key} is a group of settings; give one of them, such as {inside[0]}=..."
            )
        elif key.startswith(HYDRAS_PLACES):
            raise UserError(
                f"{word}: Hydra makes no directories and starts no sweeps here; platform.runs=DIR "
                "is where runs and sweeps lie, and sweep.parallel=N trains N trials at once"
            )
        elif key.startswith("sweep.space"):
            raise UserError(
                f"{word}: ranges are settings with several values, and need -m: "
                "optim.lr=1e-3,1e-2, or sweep=NAME, a file of conf/sweep"
            )
        elif key not in (*keys, *sections) and not is_hydras(key):
            raise UserError(unknown_key(key, keys))
        elif "=" not in word:
            raise UserError(f"{word} has no value: give {key}=...")
        elif word.startswith("+") and not word.startswith("++"):
            raise UserError(
                f"{word}: the setting exists already, so it needs no +; give "
                f"{shlex.quote(word[1:])}"
            )


def is_hydras(key: str) -> bool:
    """Return whether a key is of Hydra's own settings, or says in its way where an option goes."""
    return key.split(".")[0] == "hydra" or "/" in key or "@" in key


def _check_deletion(word: str, key: str, keys: list[str], several: Collection[str]) -> None:
    if key == "experiment" or is_hydras(key):
        return
    if key not in keys and key not in several:
        raise UserError(unknown_key(key, keys))
    instead = ""
    if key in keys:
        instead = f", or give {key}=VALUE"
    raise UserError(
        f"{word}: a setting can't be taken away; leave this out for its default{instead}"
    )


def _check_option(word: str, group: str, value: str, allowed: list[str]) -> None:
    if word.startswith("+"):
        raise UserError(
            f"{word}: the option exists already, so it needs no +; give {word.lstrip('+')}"
        )
    names = [value]
    if group == "experiment" and value == "null":
        return
    if group == "experiment" and value.startswith("["):
        names = [name.strip() for name in value.strip("[]").split(",") if name.strip()]
    elif "," in value:
        raise UserError(several_values(word))
    for name in names:
        if name.strip("'\"") not in allowed and not name.startswith("${"):
            raise UserError(unknown_option(group, name, allowed))


def explain_settings(error: Exception) -> str | None:
    """Return the line for one of Hydra's errors; None for any other (`common.command.Explain`)."""
    if isinstance(error, CONFIG_ERRORS):
        return explain(error, settings.keys())
    return None
