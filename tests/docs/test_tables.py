"""The tables of docs/ that are made from the registries are up to date."""

import importlib.util
import re

import pytest
import yaml

from docs import tables
from tests.docs import pages
from vjepa_fast import __version__, registry

PAGES = sorted(p for p in tables.PAGES.glob("*.md") if tables.TABLE.search(p.read_text(encoding="utf-8")))


def test_every_kind_has_a_table():
    text = (tables.PAGES / "kinds.md").read_text(encoding="utf-8")
    assert re.findall(r"<!-- table: (.+) -->", text) == [*tables.COLUMNS] == [*registry.KINDS]


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_tables_are_up_to_date(page):
    text = page.read_text(encoding="utf-8")
    assert tables.updated(text) == text, "run python docs/tables.py"


@pytest.mark.parametrize("kind", tables.BY_NAME)
def test_the_order_of_imports_does_not_show(kind, monkeypatch):
    made = tables.table(kind)
    monkeypatch.setattr(tables, "registry_of", lambda kind: dict(list(registry.registry_of(kind).items())[::-1]))
    assert tables.table(kind) == made


def test_a_table_that_is_old_is_seen():
    old = "# A\n<!-- table: decoder -->\n| name |\n<!-- end -->\nb\n"
    assert "| `pyav` |" in tables.updated(old)
    assert tables.updated(old).endswith("<!-- end -->\nb\n")


def test_modules_that_the_changelog_names_as_new_exist():
    text = (pages.ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (`vjepa_fast\..*) \| (`vjepa_fast\..*) \|$", text, re.MULTILINE)
    assert rows
    for old, new in rows:
        assert all(map(importlib.util.find_spec, re.findall(r"`(.+?)`", new))), new
        assert old != new


def test_versions_agree():
    citation = yaml.safe_load((pages.ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert citation["version"] == __version__
    assert f"## [{__version__}] - {citation['date-released']}" in (pages.ROOT / "CHANGELOG.md").read_text(
        encoding="utf-8"
    )
