"""Shell scripts for a machine: a template of this folder whose line @SETTINGS@ becomes quoted assignments, so that no value can be read as code."""

import shlex
from collections.abc import Sequence
from pathlib import Path

FOLDER = Path(__file__).parent


def fill(template: str, **settings: str | int | Sequence[str]) -> str:
    """The script `template` with `settings` as variables of bash; a sequence becomes an array."""
    return (
        (FOLDER / template)
        .read_text(encoding="utf-8")
        .replace("@SETTINGS@", "\n".join(_assign(*item) for item in settings.items()))
    )


def _assign(name: str, value: str | int | Sequence[str]) -> str:
    if isinstance(value, str | int):
        return f"{name}={shlex.quote(str(value))}"
    return "\n".join([f"{name}=(", *(f"  {shlex.quote(entry)}" for entry in value), ")"])
