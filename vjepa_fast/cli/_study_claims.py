"""``vjepa-fast study claims``: the claims about the published results, computed again with the arithmetic shown."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from vjepa_fast.cli._arguments import writable_file
from vjepa_fast.cli._console import plain, say, table_console

if TYPE_CHECKING:
    from rich.table import Table

HELP = "recompute the 17 claims about the published results, and from one's own study"
STYLES = {"confirmed": "green", "contradicted": "red"}


def add_arguments(parser: ArgumentParser) -> None:
    """Add the command's arguments."""
    parser.add_argument("--study", metavar="DIR", help="also from a study's folder (of `vjepa-fast study run`)")
    parser.add_argument(
        "--json", metavar="PATH", type=writable_file, help="also write id, status, published, computed, arithmetic, ..."
    )
    parser.add_argument("--markdown", metavar="PATH", type=writable_file, help="also write the table as Markdown")


def run(args: Namespace) -> int:
    """Print the claims, and write what is asked for."""
    from vjepa_fast.files import write_json, write_text
    from vjepa_fast.study.claims.check import TOLERANCE_TEXT, check_claims, markdown_table
    from vjepa_fast.study.claims.evaluate import load_claims
    from vjepa_fast.study.claims.measured import STUDY_TEXT, mapping_text, recompute
    from vjepa_fast.study.claims.published import load_published

    published, claims = load_published(), load_claims()
    study = None if args.study is None else recompute(args.study, claims, published)
    entries = check_claims(published, claims)
    for entry in entries:
        entry["study"] = study[entry["id"]] if study else None
    _print(entries, TOLERANCE_TEXT)
    if study:
        _print_study(entries, [STUDY_TEXT, *mapping_text()])
    content = {
        "format": 1,
        "source": published.source,
        "rounding": TOLERANCE_TEXT,
        "study": {"folder": str(args.study), "judged": STUDY_TEXT, "stand_ins": mapping_text()} if study else None,
        "claims": entries,
    }
    if args.json:
        write_json(args.json, content, allow_nan=False)
    if args.markdown:
        write_text(args.markdown, markdown_table(entries) + "\n")
    return 0


def _table(title: str, columns: Iterable[str]) -> Table:
    from rich.table import Table

    table = Table(title=title, title_justify="left", show_lines=True)
    table.add_column("id", justify="right")
    for name in columns:
        table.add_column(name)
    return table


def _colour(status: str) -> str:
    style = STYLES.get(status, "dim")
    return f"[{style}]{status}[/{style}]"


def _print(entries: Sequence[dict], rounding: str) -> None:
    from vjepa_fast.study.claims.check import same_seed_text, value_text

    names = ("claim", "status", "computed", "against two baseline seeds", "against the baseline of the same seed")
    table = _table("The claims, from the published figures (top-1 in %, differences in points)", names)
    for e in entries:
        found = _colour(e["status"]), *map(plain, (value_text(e["computed"]), e["placement"], same_seed_text(e)))
        table.add_row(plain(e["id"]), plain(e["statement"]), *found)
    table_console(160, least=120).print(table)
    for e in entries:
        say(f"{e['id']:>2}  {e['status']}: {e['arithmetic']}")
        if e["other_reading"]:
            other = e["other_reading"]
            say(f"    {other['reading']}: {other['status']}, {value_text(other['computed'])}")
        for note in e["notes"]:
            say(f"    note: {note}")
    say("", rounding)
    counts = {s: sum(e["status"] == s for e in entries) for s in dict.fromkeys(e["status"] for e in entries)}
    say(", ".join(f"{n} {status}" for status, n in counts.items()))


def _print_study(entries: Sequence[dict], how: Sequence[str]) -> None:
    table = _table("The claims, from your own study", ("claim", "mode", "status", "arithmetic"))
    for e in entries:
        for found in e["study"]:
            mode, arithmetic = plain(found["compat"]), plain(found["arithmetic"])
            table.add_row(plain(e["id"]), plain(e["statement"]), mode, _colour(found["status"]), arithmetic)
    table_console(160, least=120).print(table)
    say(*how)
