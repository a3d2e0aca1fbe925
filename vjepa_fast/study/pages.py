"""HTML pages with everything inside them (styles and pictures as data), readable without a network."""

from __future__ import annotations

import datetime
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any


def render(
    template: Path, content: Mapping[str, Any], filters: Mapping[str, Callable], functions: Mapping[str, Callable] = {}
) -> str:
    """The page of a Jinja template, which may include ``templates/style.css`` beside this module.

    ``content``: the template's values, to which ``created``, the time of writing, is added; text is escaped.
    ``functions``: what its macros may call.
    """
    import jinja2

    loader = jinja2.FileSystemLoader([template.parent, Path(__file__).parent / "templates"])
    environment = jinja2.Environment(loader=loader, autoescape=True, trim_blocks=True, lstrip_blocks=True)
    environment.filters.update(filters)
    environment.globals.update(functions)
    created = datetime.datetime.now().astimezone().strftime("%d %B %Y, %H:%M %Z")
    return environment.get_template(template.name).render(**content, created=created)
