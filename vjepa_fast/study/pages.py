"""Text from Jinja templates. HTML pages have everything inside them: styles, and pictures as data.

What stands in the templates is ours; every value is escaped, because names, notes and versions come from files.
"""

from __future__ import annotations

import base64
import datetime
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any


def svg_uri(svg: str) -> str:
    """The text of an SVG file as a data URI."""
    return "data:image/svg+xml;base64," + base64.b64encode(svg.encode()).decode()


def plain_markdown(text: str) -> str:
    """Text that Markdown shows as it is, on one line: no table cell, emphasis, link, code or HTML comes of it."""
    text = re.sub(r"\s+", " ", text).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    text = re.sub(r"([\\`*|\[\]])", r"\\\1", text)
    return re.sub(r"(?<![A-Za-z0-9_])_|_(?![A-Za-z0-9_])", r"\_", text)  # one inside of a word is no emphasis


def render(template: Path, content: Mapping[str, Any], **filters: Callable) -> str:
    """The text of a template ``*.html.j2`` (it may include ``templates/style.css``) or ``*.md.j2``.

    ``content``: the template's values, to which ``created``, the time of writing, is added. Values are escaped as the
    kind of page needs it; the filter ``svg_uri`` makes a picture's data URI.
    """
    import jinja2
    from markupsafe import Markup

    def markdown(value: object) -> object:
        if isinstance(value, Markup) or not isinstance(value, str):
            return value
        return Markup(plain_markdown(value))

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader([template.parent, Path(__file__).parent / "templates"]),
        autoescape=True,
        finalize=markdown if template.name.endswith(".md.j2") else None,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(filters, svg_uri=svg_uri)
    created = datetime.datetime.now().astimezone().strftime("%d %B %Y, %H:%M %Z")
    return environment.get_template(template.name).render(**content, created=created)
