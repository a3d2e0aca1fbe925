"""``vjepa-fast study pack DIR``: a study in one archive, to go on with on another machine."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace

from vjepa_fast.cli._arguments import positive_real
from vjepa_fast.cli._console import say

HELP = "put a study in one archive of limited size, to go on with it elsewhere"


def add_arguments(parser: ArgumentParser) -> None:
    """Add the command's arguments."""
    parser.add_argument("folder", metavar="DIR", help="folder of the study; no command may be at work in it")
    parser.add_argument("out", metavar="FILE.tar.gz", help="the archive")
    parser.add_argument("--data", action="store_true", help="rendered and decoded clips too (else rendered again)")
    parser.add_argument("--mb", type=positive_real, default=50.0, help="most megabytes (default %(default)g)")


def run(args: Namespace) -> int:
    """Write the archive; say what is in it and what is not."""
    from vjepa_fast.study.run.pack import pack

    packed = pack(args.folder, args.out, data=args.data, most=args.mb)
    say(f"{packed.path}: {packed.megabytes:.1f} MB, {packed.cells} cells, {len(packed.stopped)} stopped runs")
    if packed.left_out:
        say(f"over {args.mb:g} MB, will start anew: {', '.join(packed.left_out)}")
    return 0
