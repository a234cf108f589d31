"""The words of a command line, `key=value`, before Hydra's parser reads them.

A value that needs no quotes in a shell needs none here: if Hydra's grammar can't read it, or reads
a type that its setting can't have, it is text. The grammar stays for other settings and for sweeps
(a,b; choice(); range(); [lists]; {a: 1}; 'quotes').
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
# These decide where and how safely a trial runs, not its result: no sweep tries them.
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
        # Quote what could be read as another type, or has characters that Hydra interprets.
        reserved = value.lower() in ("null", "true", "false", "nan", "inf")
        if re.fullmatch(r"[A-Za-z_/][A-Za-z0-9_./-]*", value) and not reserved:
            return value
        return quoted(value)
    return json.dumps(value)


def quoted(value: str) -> str:
    """Return text in Hydra's double quotes; in a shell, put single ones around it."""
    # Double the backslashes before a quote and at the end; escape the quote with one more.
    escaped = re.sub(r'(\\*)("|$)', lambda end: end[1] * 2 + end[2].replace('"', '\\"'), value)
    return f'"{escaped}"'


def parse(words: Iterable[str]) -> list[Override]:
    """Parse words by Hydra's grammar. Raise one of Hydra's errors."""
    return list(_parser().parse_overrides(list(words)))


def readable(
    words: Iterable[str], schema: Mapping[str, Field] | None = None, sweeps: bool = False
) -> list[str]:
    """Return words that mean what was typed, as Hydra's grammar can read them.

    Applying this again changes nothing. schema: each setting by its key; None: the
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
    """Return whether a value with commas is an existing path, and not a sweep's list.

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
    """Return whether a comma in this setting is only a comma.

    It is in a path, in the run's name, and in `target.*`: no sweep tries machines.
    """
    return entry.metadata["path"] or key == "name" or key.startswith("target.")


def _own_dollars(value: str, entry: Field, schema: Mapping[str, Field]) -> str:
    """Escape ${NAME} in a path, so that it means the environment's, unless a setting has this name.

    OmegaConf would look for a setting, and fail at a ${ that isn't closed.
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
    """Raise UserError for a list or range that can't be read, with the right way to type it."""
    character = character_of(error)
    if not is_text:
        raise UserError(f"{word}: {character} can't be read as a range; allowed: {RANGES}")
    if "," in value:
        values = ",".join(quoted(part.strip()) for part in value.split(","))
        raise UserError(
            f"{word}: {character} can't stand unquoted in a list; "
            f"give {shlex.quote(f'{key}={values}')}"
        )
