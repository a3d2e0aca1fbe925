"""``vjepa-fast show``: one page about a run and one's own videos."""

from __future__ import annotations

import argparse

from vjepa_fast.cli._arguments import add_device, at_least, device_of, positive, writable_file
from vjepa_fast.cli._console import say

HELP = "write a page of a run: curves, masks on your videos, maps of features and attention, nearest clips"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the flags."""
    parser.add_argument("target", metavar="RUN_OR_VIDEO", help="run folder, checkpoint, or a video with --encoder")
    parser.add_argument("--encoder", metavar="RUN", help="run folder, checkpoint or weights whose features are shown")
    parser.add_argument("--out", type=writable_file, default="show.html", help="the page (default %(default)s)")
    parser.add_argument("--clips", type=positive, default=3, help="clips shown (default %(default)s)")
    parser.add_argument(
        "--among", type=at_least(0), default=64, help="clips of the training data to compare with (default %(default)s)"
    )
    add_device(parser)


def run(args: argparse.Namespace) -> int:
    """Read, draw and write; the exit code."""
    from vjepa_fast.study.show.page import write_page
    from vjepa_fast.study.show.read import read_shown, refuse_out

    out = refuse_out(args.out)
    shown = read_shown(
        args.target,
        args.encoder,
        clips=args.clips,
        among=args.among,
        device=device_of(args.device),
        say=lambda text: say(text, err=True),
    )
    write_page(shown, out)
    curves = f"{len(shown.run.metrics)} rows, " if shown.run is not None else ""
    say(f"{out}: {curves}{len(shown.maps)} clips, {len(shown.near)} with nearest ones")
    return 0
