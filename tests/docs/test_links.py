"""Links of all Markdown pages lead to files and headings that exist; the site's navigation names every page."""

import contextlib
import importlib
import re
import subprocess

import pytest
import yaml

from tests.docs import pages

TRACKED = subprocess.run(["git", "ls-files", "*.md"], cwd=pages.ROOT, capture_output=True, text=True)
# An unpacked source archive has no git: the pages that are always there are looked at.
# Names that stand for a file to be written, or are found elsewhere.
EXAMPLES = re.compile(r"vjepa_fast\.plugins|(runs|profile)/|.*\b(test_)?(foo|NAME)\.\w+$")
MARKDOWN = [pages.ROOT / p for p in TRACKED.stdout.split()] or pages.PAGES


@pytest.mark.parametrize("page", MARKDOWN, ids=lambda p: p.relative_to(pages.ROOT).as_posix())
def test_links_lead_somewhere(page):
    broken = []
    for line, link in pages.links(page):
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        if not target.exists():
            broken.append(f"{line}: {link}: no such file")
        elif anchor and anchor not in pages.anchors(target):
            broken.append(f"{line}: {link}: no such heading; there are {', '.join(sorted(pages.anchors(target)))}")
    assert not broken


@pytest.mark.parametrize("page", pages.PAGES, ids=lambda p: p.name)
def test_files_and_modules_named_in_code_exist(page):
    names = set(re.findall(r"(?<!`)`([\w./*]+)`", page.read_text(encoding="utf-8")))
    missing = []
    for name in sorted(names):
        if re.fullmatch(r"[\w/*]+/[\w*]+\.(py|cpp|h|json|md|yaml)", name):
            if not any(any(folder.glob(name)) for folder in (pages.ROOT, pages.ROOT / "vjepa_fast")):
                missing.append(name)
        elif name.startswith("vjepa_fast.") and not exists(name):
            missing.append(name)
    assert not [name for name in missing if not EXAMPLES.match(name)]


def exists(name):
    """Whether ``vjepa_fast.a.b.c`` is a module or something in one."""
    value = importlib.import_module("vjepa_fast")
    for part in name.split(".")[1:]:
        if not hasattr(value, part):
            with contextlib.suppress(ImportError):
                importlib.import_module(f"{value.__name__}.{part}")
        if not hasattr(value, part):
            return False
        value = getattr(value, part)
    return True


def test_links_that_lead_nowhere_are_seen(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("# A `b` c-d\n\n[x](gone.md) [y](#a-b-c-d) `[z](code.md)` [w](https://example.org)\n")
    assert pages.links(page) == [(3, "gone.md"), (3, "#a-b-c-d")]
    assert pages.anchors(page) == {"a-b-c-d"}


def test_navigation_names_every_page():
    text = (pages.ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    named = set(re.findall(r"[\w/.-]+\.md", str(yaml.safe_load(text)["nav"])))
    assert {p.name for p in (pages.ROOT / "docs").glob("*.md")} <= named
