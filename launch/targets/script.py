"""Shell scripts for a machine, from the templates of this folder.

The line @SETTINGS@ becomes quoted assignments, so that bash reads no value as code; @DEADLINE@
becomes the code that ends a machine at its limit, @UPLOADS@ that which saves a run in the bucket.
"""

import shlex
from collections.abc import Sequence
from pathlib import Path

FOLDER = Path(__file__).parent


def fill(template: str, **settings: str | int | Sequence[str]) -> str:
    """Return the script `template` with `settings` as bash's variables; sequences are arrays."""
    text = (FOLDER / template).read_text(encoding="utf-8")
    for part in ("DEADLINE", "UPLOADS"):
        text = text.replace(f"@{part}@", _part(part))
    return text.replace("@SETTINGS@", "\n".join(_assign(*item) for item in settings.items()))


def _part(name: str) -> str:
    """Return a part that several scripts have in common."""
    return (FOLDER / f"{name.lower()}.sh").read_text(encoding="utf-8").rstrip("\n")


def _assign(name: str, value: str | int | Sequence[str]) -> str:
    if isinstance(value, str | int):
        return f"{name}={shlex.quote(str(value))}"
    return "\n".join([f"{name}=(", *(f"  {shlex.quote(entry)}" for entry in value), ")"])
