"""HTML pages from Jinja templates: one environment for the report, the sweep and the audit."""

import base64
import functools
import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup


def render(template: Path, filters: dict[str, Callable[..., Any]], **values: Any) -> str:
    """Return the page of a template; text is escaped, and an unknown name is an error."""
    made = environment(template.parent)
    made.filters.update(filters)
    return made.get_template(template.name).render(values)


@functools.cache
def environment(folder: Path) -> jinja2.Environment:
    """Return the environment that reads and caches a folder's templates."""
    return jinja2.Environment(
        loader=jinja2.FileSystemLoader(folder),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )


@dataclass(frozen=True)
class Script:
    """A page's only script. policy: its source expression for the Content-Security-Policy."""

    text: Markup
    policy: str


def script(path: Path) -> Script:
    """Return a file as the page's script; the policy allows no other text to run."""
    text = path.read_text(encoding="utf-8")
    digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
    return Script(Markup(text), f"'sha256-{digest}'")
