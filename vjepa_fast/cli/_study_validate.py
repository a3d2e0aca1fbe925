"""``vjepa-fast study validate``: can the suites of a study tell a good encoder from a bad one?"""

from __future__ import annotations

from argparse import ArgumentParser, Namespace

from vjepa_fast.cli._arguments import names, positive
from vjepa_fast.cli._console import say

HELP = "instrument check: what labels, random weights and raw pixels reach on each suite"


def add_arguments(parser: ArgumentParser) -> None:
    """Add the command's arguments."""
    parser.add_argument(
        "folder", metavar="DIR", nargs="?", default="runs/instrument", help="study, or new folder (default %(default)s)"
    )
    parser.add_argument(
        "--suite", type=names, default=[], metavar="NAMES", help="these only, such as fewshot,order (default: all)"
    )
    parser.add_argument("--out", metavar="FILE", help="where the result is written (default DIR/instrument.json)")
    parser.add_argument("--threads", type=positive, help="CPU threads (default: torch's choice)")


def run(args: Namespace) -> int:
    """Measure what has no record yet, write the result, print it; 1 where a suite failed."""
    from pathlib import Path

    from vjepa_fast.errors import UserError
    from vjepa_fast.files import write_json
    from vjepa_fast.study.instrument.check import FILE, run_check
    from vjepa_fast.study.run.plan import read_plan
    from vjepa_fast.study.run.suites import Settings, Synthetic, settings_of

    if args.threads:
        import torch

        torch.set_num_threads(args.threads)
    folder = Path(args.folder)
    settings = settings_of(read_plan(folder)) if (folder / "study.json").is_file() else Settings()
    if settings.suite != "synthetic":
        raise UserError(f"{folder}: is a study of {settings.suite}; the check is of rendered suites")
    unknown = [name for name in args.suite if name not in Synthetic.evaluated]
    if unknown:
        raise UserError(f"--suite {unknown[0]}: not known; give {', '.join(Synthetic.evaluated)}")
    suite = Synthetic(settings, folder)
    asked = args.suite or (suite.names if settings.evaluate else Synthetic.evaluated)
    chosen = [name for name in Synthetic.evaluated if name in asked]
    found = run_check(folder, chosen, suite.setting(), say)
    path = Path(args.out) if args.out else folder / FILE
    write_json(path, found, "choose another place with --out")
    _table(found)
    say(path)
    return 0 if all(entry["passed"] for entry in found["suites"].values()) else 1


def _table(found: dict) -> None:
    for name, entry in found["suites"].items():
        rows = [row for row in found["rows"] if row["suite"] == name]
        say("", f"{name}: {'passed' if entry['passed'] else 'FAILED'} ({entry['seconds']:.0f} CPU seconds)")
        for outcome in dict.fromkeys(row["outcome"] for row in rows):
            figures = [
                f"{row['encoder']} {100 * row['accuracy']:.1f} [{100 * row['low']:.1f}, {100 * row['high']:.1f}]"
                for row in rows
                if row["outcome"] == outcome
            ]
            say(f"  {outcome:<7} {'  '.join(figures)}")
        for text in (*entry["reasons"], *entry["notes"]):
            say(f"  {text}")
