"""Hyperparameters: the trainer's overrides as SageMaker carries them, and back. Standard library only, since the container decodes with it too.

SageMaker carries a map of strings in no particular order. Each override `key=value` becomes one entry: its key as typed, its value as JSON: a number,
`true`, `false` and `null` as they are (as the tuner writes those it samples), everything else as a JSON string of the very text that was typed.
So Hydra reads in the container what it would have read on the user's own command line, whatever that text holds.
"""

import json
import re
from collections.abc import Iterable, Mapping

from trainer.common.errors import UserError

LIMIT = 256  # characters of a key or value, as the API's text says; its service model says 2,500 of a value
ENTRIES = 100
_INSTEAD = "write it into conf/experiment/NAME.yaml and give experiment=NAME"

# SageMaker's own, which say how to start and are no settings of the trainer.
RESERVED = re.compile(r"sagemaker_.*|_tuning_objective_metric")
_LITERAL = re.compile(r"true|false|null|-?(0|[1-9][0-9]*)(\.[0-9]+)?([eE][+-]?[0-9]+)?")


def encode(overrides: Iterable[str]) -> dict[str, str]:
    """The hyperparameters of `overrides`, each "key=value" or "~key" as on the trainer's command line. Raises UserError for what can't be carried."""
    texts: dict[str, str] = {}
    for override in overrides:
        key, equals, value = override.partition("=")
        if not key or not (equals or key.startswith("~")) or key.startswith("-"):
            raise UserError(f"{override}: a job takes settings only; give key=value")
        if RESERVED.fullmatch(key):
            raise UserError(
                f"{key}: SageMaker keeps this name for itself; give the setting another name"
            )
        if "\0" in override:
            raise UserError(
                f"{override!r}: no command line carries the character NUL; leave it out"
            )
        texts.pop(key, None)  # given twice: the last one counts, in its place
        texts[key] = encode_value(value) if equals else ""
        for text in (key, texts[key]):
            if _length(text) > LIMIT:
                raise UserError(
                    f"{key}: {_length(text)} characters, and SageMaker carries {LIMIT}; {_INSTEAD}"
                )
    _check_order(texts)
    if len(texts) > ENTRIES:
        raise UserError(f"{len(texts)} settings, and SageMaker carries {ENTRIES}; {_INSTEAD}")
    return texts


def decode(hyperparameters: Mapping[str, str]) -> list[str]:
    """The overrides that `hyperparameters` carry, in one fixed order."""
    keys = sorted((key for key in hyperparameters if not RESERVED.fullmatch(key)), key=_place)
    return [
        f"{key}={decode_value(hyperparameters[key])}" if hyperparameters[key] else key
        for key in keys
    ]


def encode_value(text: str) -> str:
    """The text of one value, as JSON without line breaks or other characters that don't print."""
    if _LITERAL.fullmatch(text):
        return text
    return (
        '"'
        + "".join(
            json.dumps(character, ensure_ascii=not character.isprintable())[1:-1]
            for character in text
        )
        + '"'
    )


def decode_value(value: str) -> str:
    """The text that `encode_value` was given. What is no JSON string stands for itself: the tuner's samples, and what others wrote by hand."""
    try:
        text = json.loads(value)
    except ValueError:
        return value
    return text if isinstance(text, str) else value


def _length(text: str) -> int:
    """As AWS counts: in UTF-16 units."""
    return len(text.encode("utf-16-le", "surrogatepass")) // 2


def _place(key: str) -> tuple[list[str], str]:
    """Sorts a group of settings before the settings in it, so that the narrower override comes last."""
    return key.lstrip("+~").split("."), key


def _check_order(texts: dict[str, str]) -> None:
    """Overrides of the same setting, or of a setting and of one in it, act in their order, of which only _place's survives.

    A group's option (data=folder) is no such override: Hydra takes it before all values (data.size=64), wherever it stands.
    """
    for number, later in enumerate(texts):
        for earlier in list(texts)[:number]:
            first, second = _place(earlier), _place(later)
            outer, inner = sorted((first[0], second[0]), key=len)
            option = len(outer) < len(inner) and not decode_value(
                texts[earlier if outer == first[0] else later]
            ).startswith("{")
            if inner[: len(outer)] == outer and not option and second < first:
                raise UserError(
                    f"{earlier} and {later}: SageMaker doesn't keep this order; give {later} first, or one of them"
                )
