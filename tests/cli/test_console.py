"""What comes from a file is shown as it is: no markup, no control characters."""

import ast
from pathlib import Path

import pytest

from vjepa_fast import cli
from vjepa_fast.cli._console import counting, new_table, plain, say, table_console

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


@pytest.mark.parametrize("err", [False, True])
@pytest.mark.parametrize("text", HOSTILE)
def test_lines_are_lines(text, err, capsys):
    say(text, f"a\n{text}", err=err)
    lines = capsys.readouterr()[err].split("\n")
    assert len(lines) == 3 and all(line.isprintable() for line in lines)


@pytest.mark.parametrize(
    "text", ["10.31\u202fPM", "a\u00a0b", "\u3000", "\u0645\u06cc\u200c\u0634", "\U0001f469\u200d\U0001f52c"]
)
def test_blanks_and_joiners_of_names_stay(text, capsys):
    say(text)
    assert capsys.readouterr().out == f"{text}\n" and plain(text) == text


def test_commands_print_by_no_other_way():
    """`say`, tables with `plain` texts, or the two lines of `main` itself."""
    found = {
        f"{path.name}:{node.lineno}"
        for path in Path(cli.__file__).parent.glob("*.py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "print"
    }
    assert sorted(place.split(":")[0] for place in found) == ["__init__.py", "__init__.py", "_console.py"], found
