"""Shell scripts for a machine, from the templates of this folder.

The line @SETTINGS@ becomes quoted assignments, so that no value can be read as code.
"""

import shlex
from collections.abc import Sequence
from pathlib import Path

FOLDER = Path(__file__).parent


def fill(template: str, **settings: str | int | Sequence[str]) -> str:
    """Return the script `template` with `settings` as bash's variables; sequences are arrays."""
    text = (FOLDER / template).read_text(encoding="utf-8")
    return text.replace("@SETTINGS@", "\n".join(_assign(*item) for item in settings.items()))


def _assign(name: str, value: str | int | Sequence[str]) -> str:
    if isinstance(value, str | int):
        return f"{name}={shlex.quote(str(value))}"
    return "\n".join([f"{name}=(", *(f"  {shlex.quote(entry)}" for entry in value), ")"])
