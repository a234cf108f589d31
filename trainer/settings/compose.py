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
OWN = {"data.root", "data.train", "data.labels"}  # each names the user's own images
# Hydra's own settings for a run's directory and for sweeps.
HYDRAS_PLACES = (
    "hydra.run", "hydra.sweep", "hydra.mode", "hydra.output_subdir", "hydra.launcher",
    "hydra/launcher", "hydra/sweeper",
)  # fmt: skip
GROUPS = ("data", "model", "optim", "platform", "sweep", "experiment")


@dataclass(frozen=True)
class Resolved:
    """What a command line means.

    words: the overrides for Hydra: first the implied ones, then those that were typed, in a form
    that Hydra can read. notes: a line for each implied one. composed: Hydra's result.
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
    """Add what the overrides imply. Resolving the result's words again changes nothing.

    Raise UserError for an override without effect or with a misleading one, and Hydra's own errors.
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
    """Return the overrides of a sweep's first trial: the first value of each list.

    From the space in conf/, only settings without a value take their first one. Raise as `resolve`.
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

    Raise UserError, or Hydra's error, for one that doesn't exist, or doesn't fit the sweep's other
    settings.
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
    """Return what Hydra composes, and the option that it chose from each group."""
    with hydra.initialize_config_dir(str(conf.absolute()), version_base="1.3"):
        composed = hydra.compose("config", list(words), return_hydra_config=True)
    choices = dict(composed.hydra.runtime.choices)
    with open_dict(composed):
        del composed["hydra"]
    return composed, choices


# --- what is implied: each rule returns an override and its reason, or None ---


def _own_pictures(
    given: set[str], composed: DictConfig, choices: dict[str, str]
) -> tuple[str, str] | None:
    """Choose data=folder if a folder or table of images is given without data=...

    The user means these images, and not a place for the demo's.
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
    """Fill in data.root if only a folder of training images or a table of labels is given.

    valid is then split off it, unless data.valid or the table names it.
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
    """Choose the network of a package or run of ours that is given as weights."""
    weights = composed.model.weights
    if "model.weights" not in given or weights is None or given & {"model", "model.name"}:
        return None
    path = expanded(str(weights))
    if not Path(path).exists() or not model_package.is_package(path):
        return None  # perhaps a path on the job's machine
    name = model_package.manifest(path)["config"]["model.name"]
    return override("model.name", name), f"the network of model.weights={weights}"


def _model_by_name(
    given: set[str], composed: DictConfig, choices: dict[str, str]
) -> tuple[str, str] | None:
    """Choose the settings that go with a model's name.

    Otherwise a pretrained network would get the small network's settings, and random weights.
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


# --- overrides that Hydra accepts, but that lead nowhere ---


def check(words: Sequence[str], keys: list[str], groups: dict[str, list[str]]) -> None:
    """Raise UserError for an override that deletes a setting, or replaces several at once.

    keys: every dotted key. groups: the options of each config group.
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
    """Return whether a key is one of Hydra's settings, or uses Hydra's syntax for packages."""
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
