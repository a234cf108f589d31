"""HTML pages from Jinja templates: one environment for the report, the sweep and the audit."""

import base64
import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup


def render(template: Path, filters: dict[str, Callable[..., Any]], **values: Any) -> str:
    """Return the page of a template; text is escaped, and an unknown name is an error."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(template.parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(filters)
    return environment.get_template(template.name).render(values)


@dataclass(frozen=True)
class Script:
    """A page's one script. policy: the source that a Content-Security-Policy allows it by."""

    text: Markup
    policy: str


def script(path: Path) -> Script:
    """Return a file as a page's script, which no other text of the page can be."""
    text = path.read_text(encoding="utf-8")
    digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
    return Script(Markup(text), f"'sha256-{digest}'")
