"""Hyperparameters: the trainer's overrides encoded for SageMaker, and decoded.

Standard library only, since the container decodes with it too.

SageMaker passes a map of strings in no particular order. Each override `key=value` becomes one
entry: its key as typed, its value as JSON. A number, `true`, `false` and `null` stay as they are
(so the tuner writes its samples too); any other text becomes a JSON string, character for
character. So Hydra reads in the container what it would read on the user's own command line.
"""

import json
import re
from collections.abc import Iterable, Mapping

from trainer.common.errors import UserError

# Characters of a key or value, by the API's text; its service model says 2,500 for a value.
LIMIT = 256
ENTRIES = 100
_INSTEAD = "write it into conf/experiment/NAME.yaml and give experiment=NAME"

# SageMaker's own entries, which say how to start and are not settings of the trainer.
RESERVED = re.compile(r"sagemaker_.*|_tuning_objective_metric")
_LITERAL = re.compile(r"true|false|null|-?(0|[1-9][0-9]*)(\.[0-9]+)?([eE][+-]?[0-9]+)?")


def encode(overrides: Iterable[str]) -> dict[str, str]:
    """Return the hyperparameters of `overrides`. Raise UserError for one that can't be encoded.

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
        texts.pop(key, None)  # given twice: the last one counts, at its own place
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
    """Return the overrides in `hyperparameters`, in a fixed order."""
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

    A value that is no JSON string stays as it is: the tuner's samples, and values written by hand.
    """
    try:
        text = json.loads(value)
    except ValueError:
        return value
    return text if isinstance(text, str) else value


def _length(text: str) -> int:
    """Return the length as AWS counts it, in UTF-16 code units."""
    return len(text.encode("utf-16-le", "surrogatepass")) // 2


def _place(key: str) -> tuple[list[str], str]:
    """Return a sort key that puts a group of settings before the settings in it."""
    return key.lstrip("+~").split("."), key


def _check_order(texts: dict[str, str]) -> None:
    """Raise UserError for overrides whose order matters and isn't that of `_place`.

    The order matters between overrides of the same setting, or of a setting and one inside it. A
    group's option (data=folder) is none of these: Hydra takes it before all values (data.size=64).
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
