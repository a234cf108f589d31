"""Hyperparameters: the trainer's overrides as SageMaker carries them, and back.

Standard library only, since the container decodes with it too.

SageMaker carries a map of strings in no particular order. Each override `key=value` becomes one
entry: its key as typed, its value as JSON: a number, `true`, `false` and `null` as they are (as the
tuner writes those it samples), everything else as a JSON string of the very text that was typed.
So Hydra reads in the container what it would have read on the user's own command line.
"""

import json
import re
from collections.abc import Iterable, Mapping

from trainer.common.errors import UserError

# Characters of a key or value, as the API's text says; its service model says 2,500 of a value.
LIMIT = 256
ENTRIES = 100
_INSTEAD = "write it into conf/experiment/NAME.yaml and give experiment=NAME"

# SageMaker's own, which say how to start and are no settings of the trainer.
RESERVED = re.compile(r"sagemaker_.*|_tuning_objective_metric")
_LITERAL = re.compile(r"true|false|null|-?(0|[1-9][0-9]*)(\.[0-9]+)?([eE][+-]?[0-9]+)?")


def encode(overrides: Iterable[str]) -> dict[str, str]:
    """Return the hyperparameters of `overrides`. Raise UserError for what can't be carried.

    overrides: each "key=value" or "~key", as on the trainer's command line.
    """
    texts: dict[str, str] = {}
    for override in overrides:
        key, equals, value = override.partition("=")
        if not key or not (equals or key.startswith("~")) or key.startswith("-"):
            raise UserError(f"{override}: a job takes settings only; give key=value")
        if RESERVED.fullmatch(key):
            raise UserError(f"{key}: SageMaker reserves this name; give the setting another name")
        if "\0" in override:
            raise UserError(
                f"{override!r}: a command line can't contain the character NUL; leave it out"
            )
        texts.pop(key, None)  # given twice: the last one counts, in its place
        texts[key] = encode_value(value) if equals else ""
        for text in (key, texts[key]):
            if _length(text) > LIMIT:
                raise UserError(
                    f"{key}: {_length(text)} characters, and SageMaker allows {LIMIT}; {_INSTEAD}"
                )
    _check_order(texts)
    if len(texts) > ENTRIES:
        raise UserError(f"{len(texts)} settings, and SageMaker allows {ENTRIES}; {_INSTEAD}")
    return texts


def decode(hyperparameters: Mapping[str, str]) -> list[str]:
    """Return the overrides that `hyperparameters` carry, in one fixed order."""
    keys = sorted((key for key in hyperparameters if not RESERVED.fullmatch(key)), key=_place)
    return [
        f"{key}={decode_value(hyperparameters[key])}" if hyperparameters[key] else key
        for key in keys
    ]


def encode_value(text: str) -> str:
    """Return one value as JSON without line breaks or other characters that don't print."""
    if _LITERAL.fullmatch(text):
        return text
    characters = (json.dumps(each, ensure_ascii=not each.isprintable())[1:-1] for each in text)
    return f'"{"".join(characters)}"'


def decode_value(value: str) -> str:
    """Return the text that `encode_value` was given.

    What is no JSON string stands for itself: the tuner's samples, and what was written by hand.
    """
    try:
        text = json.loads(value)
    except ValueError:
        return value
    return text if isinstance(text, str) else value


def _length(text: str) -> int:
    """Return the length as AWS counts: in UTF-16 units."""
    return len(text.encode("utf-16-le", "surrogatepass")) // 2


def _place(key: str) -> tuple[list[str], str]:
    """Return a sort key: a group of settings comes before those in it, the narrower ones last."""
    return key.lstrip("+~").split("."), key


def _check_order(texts: dict[str, str]) -> None:
    """Raise UserError for overrides whose order counts and isn't that of `_place`.

    Those of the same setting, or of a setting and of one in it, act in their order. A group's
    option (data=folder) is no such override: Hydra takes it before all values (data.size=64).
    """
    for number, later in enumerate(texts):
        for earlier in list(texts)[:number]:
            first, second = _place(earlier), _place(later)
            outer, inner = sorted((first[0], second[0]), key=len)
            group = earlier if outer == first[0] else later
            is_option = len(outer) < len(inner) and not decode_value(texts[group]).startswith("{")
            if inner[: len(outer)] == outer and not is_option and second < first:
                raise UserError(
                    f"{earlier} and {later}: SageMaker doesn't keep this order; "
                    f"give {later} first, or one of them"
                )
