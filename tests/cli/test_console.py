"""What comes from a file is shown as it is: no markup, no control characters."""

import pytest

from vjepa_fast.cli._console import counting, new_table, plain, table_console

HOSTILE = ["[red]x", "[/x]", "\x1b[31mred\x1b[0m", "a\rb", "x\udcffy", "\\[bold]"]


@pytest.mark.parametrize("text", HOSTILE)
def test_names_are_shown_as_they_are(text, capsys):
    table = new_table(text, ("encoder",))
    table.add_row(plain(text))
    table_console().print(table)
    with counting() as show:
        show(text, 0, 0)
        show(text, 1, 2)
    out = "".join(capsys.readouterr())
    assert "\x1b" not in out and "\r" not in out
    assert "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in text) in out
