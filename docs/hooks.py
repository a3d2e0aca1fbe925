"""What MkDocs does to the pages: those outside docs/ come in, links to other files of the repository work.

README.md becomes the first page; CONTRIBUTING.md, CHANGELOG.md and SECURITY.md become pages too. A page in docs/ links
to files of the repository as it would anywhere (``../benchmarks/results/demo.json``): such a file is copied into the
site, below ``files/``. A link to a folder is left out of the site, since it has no page to show. Pages ``api/NAME.md``
of the navigation are the reference of ``vjepa_fast.NAME``, from its docstrings.
"""

from __future__ import annotations

import importlib
import posixpath
import re
from pathlib import Path
from types import ModuleType
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parents[1]
PAGES = {"README.md": "index.md", "CONTRIBUTING.md": "CONTRIBUTING.md", "CHANGELOG.md": "CHANGELOG.md"}
PAGES["SECURITY.md"] = "SECURITY.md"
LINK = re.compile(r"(!?)\[((?:[^\[\]]|\[[^\]]*\])*)\]\(([^()\s]+)\)")


def on_files(files: Files, config: Any) -> Files:
    """Add the pages that are not in docs/, and the files that any page links to."""
    for source, page in PAGES.items():
        files.append(File.generated(config, page, content=(ROOT / source).read_text(encoding="utf-8")))
    for name in re.findall(r"api/([\w.]+)\.md", repr(config["nav"])):
        files.append(File.generated(config, f"api/{name}.md", content=reference(f"vjepa_fast.{name}")))
    for page in [f for f in files if f.is_documentation_page() and not f.src_uri.startswith("api/")]:
        for _, _, link in LINK.findall(page.content_string):
            path = target(page.src_uri, link)
            copy = f"files/{path}"
            if path and not path.startswith("docs/") and (ROOT / path).is_file() and copy not in files.src_uris:
                files.append(File.generated(config, copy, abs_src_path=str(ROOT / path)))
    return files


def reference(module: str) -> str:
    """The page of a module: what mkdocstrings reads there, and what its ``__getattr__`` imports on first use."""
    text = f"# {module}\n\n::: {module}\n"
    package = importlib.import_module(module)
    if hasattr(package, "__getattr__"):
        for entry in (getattr(package, name) for name in package.__all__):
            if not isinstance(entry, ModuleType):
                text += f"\n::: {entry.__module__}.{entry.__qualname__}\n    options: {{show_root_heading: true}}\n"
    return text


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """Rewrite links to files of the repository."""
    uri = page.file.src_uri

    def rewrite(match: re.Match[str]) -> str:
        bang, text, link = match.groups()
        bare, _, anchor = link.partition("#")
        path = target(uri, bare)
        if path is None:
            return match[0]
        if (ROOT / path).is_dir():
            return text
        other = path.removeprefix("docs/") if path.startswith("docs/") else PAGES.get(path, f"files/{path}")
        relative = posixpath.relpath(other, posixpath.dirname(uri) or ".")
        return f"{bang}[{text}]({relative}{'#' + anchor if anchor else ''})"

    return LINK.sub(rewrite, markdown)


def target(uri: str, link: str) -> str | None:
    """Path in the repository that ``link`` on the page ``uri`` leads to; None where MkDocs finds it by itself."""
    if re.match(r"[a-z]+:|#", link):
        return None
    home = "" if uri in PAGES.values() else "docs"
    if uri.startswith("files/"):
        home, uri = "", uri.removeprefix("files/")
    path = posixpath.normpath(posixpath.join(home, posixpath.dirname(uri), link.partition("#")[0]))
    return None if path.startswith("docs/") and home == "docs" else path
