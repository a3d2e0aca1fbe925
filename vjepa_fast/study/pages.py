"""Text from Jinja templates. HTML pages have everything inside them: styles, and pictures as data."""

from __future__ import annotations

import datetime
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any


def render(template: Path, content: Mapping[str, Any], **filters: Callable) -> str:
    """The text of a template ``*.html.j2`` (values are escaped; it may include ``templates/style.css``) or ``*.md.j2``.

    ``content``: the template's values, to which ``created``, the time of writing, is added.
    """
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader([template.parent, Path(__file__).parent / "templates"]),
        autoescape=template.name.endswith(".html.j2"),
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(filters)
    created = datetime.datetime.now().astimezone().strftime("%d %B %Y, %H:%M %Z")
    return environment.get_template(template.name).render(**content, created=created)
