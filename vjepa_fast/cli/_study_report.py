"""``vjepa-fast study report DIR``: tables and plots of a study that ran."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace

from vjepa_fast.cli._console import say
from vjepa_fast.errors import UserError

HELP = "tables and plots of a study: HTML, Markdown, CSV, LaTeX, JSON"


def add_arguments(parser: ArgumentParser) -> None:
    """Add the command's arguments."""
    parser.add_argument("folder", metavar="DIR", help="folder of `vjepa-fast study run`")
    parser.add_argument("--html", metavar="PATH", help="self-contained page (default of all five: DIR/report.*)")
    parser.add_argument("--md", metavar="PATH", help="Markdown")
    parser.add_argument("--csv", metavar="PATH", help="every comparison, one per line")
    parser.add_argument("--latex", metavar="PATH", help="tables for booktabs")
    parser.add_argument("--json", metavar="PATH", help="the answer, every comparison and the cost as JSON")
    parser.add_argument(
        "--margin",
        type=float,
        default=2.0,
        metavar="POINTS",
        help="call differences within +-POINTS equivalent (default %(default)s percentage points)",
    )
    parser.add_argument(
        "--partial", action="store_true", help="report although cells are missing; the report names them"
    )


def run(args: Namespace) -> int:
    """Write the report and print the answer."""
    from vjepa_fast.study.report.write import FILES, write_study_report

    if not 0 < args.margin < 100:
        raise UserError(f"--margin {args.margin:g}: expected percentage points above 0 and below 100, such as 2")
    paths = {kind: getattr(args, kind) for kind in FILES if getattr(args, kind)}
    made, written = write_study_report(args.folder, paths or None, partial=args.partial, margin=args.margin / 100)
    say(made["headline"])
    for line in made["barred_lines"] + made["answer_lines"]:
        say(f"  {line}")
    if made["missing"]:
        say(f"incomplete: {len(made['missing'])} cells are missing: {made['missing_text']}")
    if made["study"].plan.get("suite") == "paper":
        from vjepa_fast.study.paper import write_paper_table

        written = [*written, write_paper_table(args.folder, args.partial)]
    for path in written:
        say(f"written: {path}")
    return 0
