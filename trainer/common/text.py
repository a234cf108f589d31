"""Words for people."""

from collections.abc import Iterable


def listed(items: Iterable[str], limit: int = 5) -> str:
    """Return the items in one line: "a, b and 3 more" where there are more than `limit`."""
    names = list(items)
    text = ", ".join(names[:limit])
    if len(names) > limit:
        text += f" and {len(names) - limit} more"
    return text
