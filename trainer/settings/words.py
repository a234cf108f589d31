"""The words of a command line, `key=value`, before Hydra's parser reads them.

What may stand unquoted in a shell may stand unquoted here: a value that Hydra's grammar can't read,
or reads as something that its setting can't be, is text. What the grammar means for other settings
and for sweeps (a,b; choice(); range(); [lists]; {a: 1}; 'quotes') stays.
"""

import dataclasses
import json
import re
import shlex
from collections.abc import Iterable, Mapping
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import ChoiceSweep, Override
from hydra.errors import HydraException

from trainer.common.errors import UserError
from trainer.common.paths import expanded
from trainer.settings import config as settings
from trainer.settings.hydra_errors import character_of

Value = bool | int | float | str | list[Any] | None
Field = dataclasses.Field[Any]

RANGES = "a,b,c, range(start,stop,step), interval(low,high) or tag(log,interval(low,high))"
# These say where and how safely a trial runs, not what it is: no sweep tries them.
FIXED = ("name", "platform", "checkpoint", "sweep")


def key_of(word: str) -> str:
    """Return the key of an override: `optim.lr` of `optim.lr=1e-3`."""
    return word.split("=", 1)[0].lstrip("+~")


def override(key: str, value: Value) -> str:
    """Return `key=value` as Hydra takes it, so that it gives back the same value and type."""
    return f"{key}={text(value)}"


def text(value: Value) -> str:
    """Return a value as Hydra's command line takes it."""
    if isinstance(value, list):
        return f"[{','.join(text(element) for element in value)}]"
    if isinstance(value, str):
        # What could be read as something else, or holds what is special to Hydra, is quoted.
        reserved = value.lower() in ("null", "true", "false", "nan", "inf")
        if re.fullmatch(r"[A-Za-z_][A-Za-z0-9_./-]*", value) and not reserved:
            return value
        return quoted(value)
    return json.dumps(value)


def quoted(value: str) -> str:
    """Return text in Hydra's double quotes, which a person's shell takes in single ones."""
    # Backslashes are doubled before a quote, which gets one more, and at the end.
    escaped = re.sub(r'(\\*)("|$)', lambda end: end[1] * 2 + end[2].replace('"', '\\"'), value)
    return f'"{escaped}"'


def parse(words: Iterable[str]) -> list[Override]:
    """Return what Hydra's grammar reads in words. Raise one of Hydra's errors."""
    return list(_parser().parse_overrides(list(words)))


def readable(
    words: Iterable[str], schema: Mapping[str, Field] | None = None, sweeps: bool = False
) -> list[str]:
    """Return words that mean what was typed, as Hydra's grammar can read them.

    They stay the same when this is done once more. schema: each setting by its key; None: the
    trainer's. sweeps: whether a,b are values to try one after the other. Raise UserError for a list
    or range of a sweep that can't be read, and for a switch that is a number.
    """
    known = schema or settings.schema()
    return [_readable(word, known, sweeps) for word in words]


@cache
def _parser() -> OverridesParser:
    return OverridesParser.create()


def _readable(word: str, schema: Mapping[str, Field], sweeps: bool) -> str:
    prefixed, equals, value = word.partition("=")
    key = prefixed.lstrip("+")
    if not equals or key not in schema:
        return word
    entry, sweeps = schema[key], sweeps and key.split(".")[0] not in FIXED
    if sweeps and is_one_path(word, schema):
        sweeps = False
    kinds = settings.kinds(entry)
    try:
        (parsed,) = parse([word])
    except HydraException as error:
        if sweeps and re.search(r"[,(]", value):
            _refuse_range(word, key, value, str in kinds, error)
        return f"{prefixed}={quoted(_own_dollars(value, entry, schema))}"
    read = parsed.value()
    if parsed.is_sweep_override():
        listed = isinstance(read, ChoiceSweep) and read.simple_form
        if listed and not sweeps and _is_free_text(key, entry):
            return f"{prefixed}={quoted(_own_dollars(value, entry, schema))}"
        return word
    if isinstance(read, str):
        meant = _own_dollars(read, entry, schema)
        if meant == read:
            return word
        return f"{prefixed}={quoted(meant)}"
    if bool in kinds and type(read) is int and read not in (0, 1):
        raise UserError(f"{word} is of the wrong type; allowed: true or false")
    if isinstance(read, bool) and str(read).lower() in entry.metadata["choices"]:
        value = str(read).lower()  # a switch with more than two positions
    if str in kinds and read is not None:  # a run may be called 007 or true
        return f"{prefixed}={quoted(_own_dollars(value, entry, schema))}"
    return word


def is_one_path(word: str, schema: Mapping[str, Field] | None = None) -> bool:
    """Return whether a path that a sweep might take for a list is the place of something.

    schema: each setting by its key; None: the trainer's.
    """
    key, _, value = word.partition("=")
    entry = (schema or settings.schema()).get(key.lstrip("+"))
    if entry is None or not entry.metadata["path"] or "," not in value:
        return False
    with suppress(UserError, OSError, ValueError):  # of a path that can't be
        return Path(expanded(value)).exists()
    return False


def _is_free_text(key: str, entry: Field) -> bool:
    """Return whether a comma in one value is only a comma.

    It is in a path, in the run's name, and in what says where to run: no sweep tries machines.
    """
    return entry.metadata["path"] or key == "name" or key.startswith("target.")


def _own_dollars(value: str, entry: Field, schema: Mapping[str, Field]) -> str:
    """Return a path whose ${NAME} is the environment's, where no setting has this name.

    OmegaConf would look for a setting, and at a ${ that isn't closed for its end.
    """
    if not entry.metadata["path"]:
        return value
    tops = {key.split(".")[0] for key in schema}

    def escaped(dollars: re.Match[str]) -> str:
        if dollars[1] in tops:
            return dollars[0]
        return f"\\{dollars[0]}"

    return re.sub(r"(?<!\\)\$\{(?:([A-Za-z_]\w*)\}|(?![^{}]*\}))", escaped, value)


def _refuse_range(word: str, key: str, value: str, is_text: bool, error: Exception) -> None:
    """Raise UserError for a list or range that can't be read, with how it can be typed."""
    character = character_of(error)
    if not is_text:
        raise UserError(f"{word}: {character} can't be read as a range; allowed: {RANGES}")
    if "," in value:
        values = ",".join(quoted(part.strip()) for part in value.split(","))
        raise UserError(
            f"{word}: {character} can't stand unquoted in a list; "
            f"give {shlex.quote(f'{key}={values}')}"
        )
