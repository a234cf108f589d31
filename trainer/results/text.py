"""Values as text, for the report and the sweep's page."""

import json
import math
from typing import Any

from markupsafe import Markup

NAME_LENGTH = 80  # characters of a name; file systems allow 255


def percent(share: float) -> str:
    """Return percent with one decimal; 0% and 100% only if there was no hit, or no miss."""
    if not math.isfinite(share):
        return "n/a"
    if share in (0, 1):
        return f"{share:.0%}"
    if share > 0.9995:
        return "> 99.9%"
    if share < 0.0005:
        return "< 0.1%"
    return f"{share:.1%}"


def number(value: float) -> str:
    """Return with three digits."""
    if not math.isfinite(value):
        return "n/a"
    return f"{value:.3g}"


def share(share: float) -> str:
    """Return as an SVG length.

    Percentages let a drawing stretch while its text and lines keep their size.
    """
    return f"{share * 100:.4g}%"


def setting(value: Any) -> str:
    """Return a setting as the command line takes it."""
    if isinstance(value, str):
        return value
    return json.dumps(value, ensure_ascii=False, default=str)


def shortened(text: str, length: int = NAME_LENGTH) -> str:
    """Return the text, or its beginning and an ellipsis where it has more characters."""
    if len(text) <= length:
        return text
    return text[: length - 1] + "…"


def breakable(text: str) -> Markup:
    """Return a name that may break after its underscores: class names are long, without spaces."""
    return Markup("_<wbr>").join(shortened(text).split("_"))
