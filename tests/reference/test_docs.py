"""docs/reference-differences.md names tests; they must exist."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_every_test_that_the_table_names_exists():
    text = (ROOT / "docs" / "reference-differences.md").read_text()
    named = re.findall(r"`(tests/[\w/]+\.py)(?:::(\w+))?`", text)
    assert len(named) > 20
    for path, function in named:
        assert (ROOT / path).is_file(), path
        assert f"def {function}(" in (ROOT / path).read_text() or not function, (path, function)
    rows = [line for line in text.splitlines() if line.startswith("| ") and "::" not in line]
    assert all(line.startswith("| the released code |") for line in rows)  # every other row has its proof
