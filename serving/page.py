"""The page to try the model, and what it says of it."""

import base64
import hashlib
import re
from pathlib import Path
from typing import Any

from serving.package import Package


def read() -> bytes:
    """Return the page."""
    return Path(__file__).with_name("page.html").read_bytes()


def card(package: Package) -> dict[str, Any]:
    """Return what the page says of the model."""
    return {
        "classes": list(package.classes),
        "metrics": package.metrics,
        "created": package.created,
        "revision": package.revision,
        "model": package.config.get("model.name"),
        "size": package.preprocessing.size,
    }


def policy(page: bytes) -> str:
    """Return the page's Content-Security-Policy.

    Its own script and style, by their hashes, and nothing else that runs.
    """

    def hashes(tag: str) -> str:
        texts = re.findall(f"<{tag}>(.*?)</{tag}>".encode(), page, re.DOTALL)
        return " ".join(
            f"'sha256-{base64.b64encode(hashlib.sha256(text).digest()).decode()}'" for text in texts
        )

    return (
        f"default-src 'none'; script-src {hashes('script')}; style-src {hashes('style')}; "
        "connect-src 'self'; img-src blob: data: https: http:; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )
