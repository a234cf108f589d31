"""JSON objects from files that may be damaged, or another file in their place.

Standard library only.
"""

import json
from typing import Any


def parsed(text: bytes | str) -> dict[str, Any] | None:
    """Return the JSON object that `text` is; None: it is none."""
    try:
        value = json.loads(text)
    except ValueError:
        return None
    if isinstance(value, dict):
        return value
    return None
