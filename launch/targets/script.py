"""Shell scripts for a machine, from the templates of this folder.

The line @SETTINGS@ becomes quoted assignments, so that no value can be read as code; @DEADLINE@
what ends a machine at its limit.
"""

import shlex
from collections.abc import Sequence
from pathlib import Path

FOLDER = Path(__file__).parent


def fill(template: str, **settings: str | int | Sequence[str]) -> str:
    """Return the script `template` with `settings` as bash's variables; sequences are arrays."""
    text = (FOLDER / template).read_text(encoding="utf-8")
    text = text.replace("@DEADLINE@", _deadline())
    return text.replace("@SETTINGS@", "\n".join(_assign(*item) for item in settings.items()))


def _deadline() -> str:
    """Return what ends a machine at its limit, whatever else becomes of its script."""
    return (FOLDER / "deadline.sh").read_text(encoding="utf-8").rstrip("\n")


def _assign(name: str, value: str | int | Sequence[str]) -> str:
    if isinstance(value, str | int):
        return f"{name}={shlex.quote(str(value))}"
    return "\n".join([f"{name}=(", *(f"  {shlex.quote(entry)}" for entry in value), ")"])
