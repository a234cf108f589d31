"""The page to try the model, and the facts that it shows."""

import base64
import hashlib
import re
from pathlib import Path
from typing import Any

from serving.handler import Settings
from serving.package import Package

# Formats that browsers show, by a golden picture's suffix.
SHOWN = {
    ".jpg": "image/jpeg",
    ".jpeg": "image/jpeg",
    ".png": "image/png",
    ".webp": "image/webp",
    ".gif": "image/gif",
    ".bmp": "image/bmp",
    ".avif": "image/avif",
}
EXAMPLES = "examples/"  # their addresses begin so, relative to the page's


def read() -> bytes:
    """Return the page."""
    return Path(__file__).with_name("page.html").read_bytes()


def examples(package: Package, settings: Settings) -> dict[str, tuple[str, bytes]]:
    """Return the golden pictures that the page offers: content type and bytes, by address."""
    if not settings.examples:
        return {}
    kinds = [(Path(name).suffix, name, data) for name, data in package.examples]
    return {
        f"{EXAMPLES}{name}": (SHOWN[suffix], data)
        for suffix, name, data in kinds
        if suffix in SHOWN
    }


def card(package: Package, settings: Settings) -> dict[str, Any]:
    """Return the facts that the page shows about the model, and what it may offer."""
    return {
        "examples": [*examples(package, settings)],
        "urls": settings.urls,
        "classes": list(package.classes),
        "metrics": package.metrics,
        "created": package.created,
        "revision": package.revision,
        "model": package.config.get("model.name"),
        "size": package.preprocessing.size,
    }


def policy(page: bytes) -> str:
    """Return the page's Content-Security-Policy.

    It allows the page's own script and style, by their hashes, and no others.
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
