"""The tables of docs/ that are made from the registries are up to date."""

import re

import pytest

from docs import tables
from vjepa_fast import registry

PAGES = sorted(p for p in tables.PAGES.glob("*.md") if "<!-- table: " in p.read_text(encoding="utf-8"))


def test_every_kind_has_a_table():
    text = (tables.PAGES / "kinds.md").read_text(encoding="utf-8")
    assert re.findall(r"<!-- table: (.+) -->", text) == [*tables.COLUMNS] == [*registry.KINDS]


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_tables_are_up_to_date(page):
    text = page.read_text(encoding="utf-8")
    assert tables.updated(text) == text, "run python docs/tables.py"


def test_a_table_that_is_old_is_seen():
    old = "# A\n<!-- table: decoder -->\n| name |\n<!-- end -->\nb\n"
    assert "| `pyav` |" in tables.updated(old)
    assert tables.updated(old).endswith("<!-- end -->\nb\n")
