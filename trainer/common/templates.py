"""HTML pages from Jinja templates: one environment for the report, the sweep and the audit."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jinja2


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
