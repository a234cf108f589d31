"""Words for people."""

from collections.abc import Iterable


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
