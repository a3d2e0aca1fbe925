"""``vjepa-fast study unpack FILE... DIR``: merge what other machines made of a study."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace

from vjepa_fast.cli._console import say

HELP = "merge archives of `study pack` into a study's folder"


def add_arguments(parser: ArgumentParser) -> None:
    """Add the command's arguments."""
    parser.add_argument("archives", metavar="FILE.tar.gz", nargs="+", help="of `vjepa-fast study pack`")
    parser.add_argument("folder", metavar="DIR", help="made if it is not there")


def run(args: Namespace) -> int:
    """Merge, and say what came."""
    from vjepa_fast.study.run.pack import unpack

    found = unpack(args.archives, args.folder)
    say(f"{args.folder}: {found['cells']} new cells, {found['stopped']} stopped runs to go on with")
    return 0
