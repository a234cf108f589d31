"""Words and figures for people."""

import math
from collections.abc import Iterable


def noted(value: float) -> float:
    """Return a metric as it is recorded, with six digits: further ones differ between machines."""
    return round(value, 6)


def listed(items: Iterable[str], limit: int = 5) -> str:
    """Return the items in one line: "a, b and 3 more" where there are more than `limit`."""
    names = list(items)
    text = ", ".join(names[:limit])
    if len(names) > limit:
        text += f" and {len(names) - limit} more"
    return text


def amount(size: float) -> str:
    """Return bytes as text, in GB or MB (powers of 1000)."""
    if size >= 1e9:
        return f"{size / 1e9:.3g} GB"
    return f"{size / 1e6:.3g} MB"


def dollars(amount: float) -> str:
    """Return US dollars: to the cent; below ten cents with two significant digits."""
    if amount == 0 or amount >= 0.095:
        return f"${amount:,.2f}"
    if amount < 0.0001:
        return "< $0.0001"
    return f"${amount:.2g}"


def duration(seconds: float) -> str:
    """Return a time in seconds, minutes or hours, whichever fits."""
    if not math.isfinite(seconds):
        return "n/a"
    if seconds == 0:
        return "0 s"
    if seconds < 0.0005:
        return "< 1 ms"
    if seconds < 0.1:
        return f"{1000 * seconds:.0f} ms"
    if seconds < 60:
        return f"{seconds:.3g} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes >= 60:
        return f"{minutes // 60} h {minutes % 60} min"
    if rest == 0:
        return f"{minutes} min"
    return f"{minutes} min {rest} s"
