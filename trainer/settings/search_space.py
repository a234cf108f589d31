"""The search space of a sweep, typed and torch-free.

One description serves the grid, Optuna and SageMaker's tuner.

A range is written as Hydra writes it, in `conf/sweep/*.yaml` and on the command line alike:

    optim.lr: interval(1e-4, 1e-1)              any number between the bounds, both included
    optim.lr: tag(log, interval(1e-4, 1e-1))    the same, evenly on a logarithmic scale
    train.batch_size: interval(8, 64)           for an integer setting: integers
    train.batch_size: 16,32,64                  these values; also choice(16,32,64)
                                                and range(16,65,16)
    model: resnet50,mobilenet_v2                options of a config group
"""

import dataclasses
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from hydra.core.override_parser.types import (
    ChoiceSweep,
    IntervalSweep,
    Override,
    RangeSweep,
    Transformer,
)
from hydra.errors import HydraException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from trainer.common.errors import UserError
from trainer.settings import config as settings
from trainer.settings.config import Config
from trainer.settings.hydra_errors import explain
from trainer.settings.words import FIXED, RANGES, Value, key_of, override, parse, readable

GROUPS = ("data", "model", "optim", "experiment")  # config groups whose options a sweep may try


@dataclass(frozen=True)
class Continuous:
    """Any float in [low, high]. log: even on a logarithmic scale."""

    key: str
    low: float
    high: float
    log: bool


@dataclass(frozen=True)
class Integer:
    """Any integer in [low, high]. log: even on a logarithmic scale."""

    key: str
    low: int
    high: int
    log: bool


@dataclass(frozen=True)
class Categorical:
    """One of the choices, each already of its setting's type."""

    key: str
    choices: tuple[Value, ...]


Parameter = Continuous | Integer | Categorical


@dataclass(frozen=True)
class Sweep:
    """A search space and how it is searched.

    See `conf/sweep/lists.yaml` for what each setting means.
    """

    engine: str  # grid or optuna
    objective: str  # the metric to improve
    trials: int  # at most; a grid has as many as it has points
    parallel: int  # trials at once
    together: int  # trials of one process, where only heads are trained
    sampler: str  # tpe or random
    pruner: str  # none, median or halving
    points: int  # values that a grid takes of an interval
    seed: int  # of the sampler
    space: tuple[Parameter, ...]

    @property
    def minimize(self) -> bool:
        """Whether less is better."""
        return self.objective.endswith("loss")


def load(
    config: Config, swept: Mapping[str, str] | None = None, fixed: Iterable[str] = ()
) -> Sweep:
    """Return the sweep of `config.sweep` and of the command line (`split`).

    The command line's ranges replace those of the space; its single values remove them. Raise
    UserError for an unknown key, one that can't be swept, and a range that doesn't fit its setting.
    """
    searched = {entry.name for entry in dataclasses.fields(Sweep)} - {"space"}
    chosen = {name: getattr(config.sweep, name) for name in searched}
    settled = {key_of(override) for override in fixed}
    ranges = {key: text for key, text in config.sweep.space.items() if key not in settled}
    ranges |= swept or {}
    if not ranges:
        raise UserError(
            "the sweep has nothing to try: "
            "give a space (sweep=lr_batch) or ranges (optim.lr=1e-3,1e-2)"
        )
    parameters = [parameter(key, text, config) for key, text in ranges.items()]
    return Sweep(**chosen, space=tuple(parameters))


def split(overrides: Iterable[str]) -> tuple[list[str], dict[str, str]]:
    """Split a command line's overrides into those with one value, and the ranges by key.

    Raise OverrideParseException.
    """
    fixed, swept = [], {}
    for parsed in parse(readable(overrides, sweeps=True)):
        assert parsed.input_line is not None
        if parsed.is_sweep_override():
            swept[parsed.get_key_element().lstrip("+")] = parsed.get_value_string()
        else:
            fixed.append(parsed.input_line)
    return fixed, swept


def firsts(swept: Mapping[str, str]) -> list[str]:
    """Return an override for the first value of each list; none for an interval.

    So a required setting may be swept.
    """
    overrides = []
    for key, text in swept.items():
        (parsed,) = parse([f"{key}={text}"])
        if not parsed.is_sweep_override():
            overrides.append(f"{key}={text}")
        elif not isinstance(parsed.value(), IntervalSweep):
            overrides.append(override(key, _listed(parsed, key, text)[0]))
    return overrides


def parameter(key: str, text: str, config: Config) -> Parameter:
    """Return the parameter for a range. Raise UserError if it doesn't fit the setting `key`."""
    if key.split(".")[0] in FIXED:
        raise UserError(
            f"{key}={text}: a sweep can't try this setting: "
            "it says where or how a trial runs, not what it is"
        )
    try:
        (parsed,) = parse([f"{key}={text}"])
    except HydraException as error:
        raise UserError(explain(error, settings.keys())) from error
    if key in GROUPS:
        return Categorical(key, tuple(str(value) for value in _listed(parsed, key, text)))
    known = settings.keys()
    if key not in known:
        raise UserError(explain(HydraException(f"Could not override '{key}'"), known))
    value = parsed.value()
    if not isinstance(value, IntervalSweep):
        values = tuple(_typed(key, choice, config) for choice in _listed(parsed, key, text))
        if any(values.count(one) > 1 for one in values):
            raise UserError(f"{key}={text} names a value twice")
        return Categorical(key, values)
    kinds = settings.kinds(settings.schema()[key])
    if not kinds & {int, float}:
        raise UserError(
            f"{key}={text}: this setting is not a number; allowed: a list of values, such as "
            f"{key}=a,b"
        )
    assert value.start is not None and value.end is not None
    bounds: list[int | float] = [value.start, value.end]
    if float not in kinds and value.start % 1 == value.end % 1 == 0:
        bounds = [int(bound) for bound in bounds]  # Hydra's are floats
    low, high = (_typed(key, bound, config) for bound in bounds)
    assert isinstance(low, int | float) and isinstance(high, int | float)
    unknown = value.tags - {"log"}
    if unknown:
        raise UserError(
            f"{key}={text}: the tag {', '.join(sorted(unknown))} is not known; allowed: log"
        )
    log = "log" in value.tags
    if not low < high:
        raise UserError(f"{key}={text}: allowed: interval(low, high) with low below high")
    if log and low <= 0:
        raise UserError(
            f"{key}={text}: a logarithmic scale can't contain {low}; allowed: bounds above 0, "
            "or no tag(log, ...)"
        )
    if float in kinds:
        return Continuous(key, float(low), float(high), log)
    return Integer(key, int(low), int(high), log)


def grid(parameter: Parameter, points: int) -> tuple[Value, ...]:
    """Return the values that a grid takes.

    All choices, or `points` evenly spaced values of an interval with both bounds, to six digits.
    """
    if isinstance(parameter, Categorical):
        return parameter.choices
    low: float
    high: float
    low, high = parameter.low, parameter.high
    if parameter.log:
        low, high = math.log(low), math.log(high)
    values = [low + (high - low) * number / max(points - 1, 1) for number in range(points)]
    if parameter.log:
        values = [math.exp(value) for value in values]
    if isinstance(parameter, Integer):
        return tuple(dict.fromkeys(round(value) for value in values))
    return tuple(min(max(float(f"{value:.6g}"), parameter.low), parameter.high) for value in values)


def _listed(override: Override, key: str, text: str) -> list[Any]:
    """Return the values of a list or range, in the order given."""
    value = override.value()
    if not isinstance(value, ChoiceSweep | RangeSweep):
        raise UserError(f"{key}={text} is not a range; allowed: {RANGES}")
    return [
        getattr(element, "text", element)  # a quoted string
        for element in override.sweep_iterator(Transformer.identity)
    ]


def _typed(key: str, value: Any, config: Config) -> Value:
    """Return the value as the setting's own type, checked against what the setting allows."""
    node = OmegaConf.structured(config)
    try:
        OmegaConf.update(node, key, value)
        typed = OmegaConf.to_object(node)
    except OmegaConfBaseException as error:
        raise UserError(explain(error, settings.keys())) from error
    (match,) = (entry for entry in settings.walk(typed) if entry[0] == key)
    settings.check(*match)
    checked: Value = match[1]
    return checked
