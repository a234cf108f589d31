"""JSON objects from files that may be damaged or swapped.

Standard library only.
"""

import json
from typing import Any


def parsed(text: bytes | str) -> dict[str, Any] | None:
    """Parse a JSON object; return None if `text` is none."""
    try:
        value = json.loads(text)
    except ValueError:
        return None
    if isinstance(value, dict):
        return value
    return None
