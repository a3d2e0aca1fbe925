"""``vjepa-fast replay``: make a training step again that was not finite, and name the module where it begins."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace

from vjepa_fast.cli._console import say

HELP = "make a failed training step again, in other precisions, and name the module where values stop being finite"


def add_arguments(parser: ArgumentParser) -> None:
    """Add the flags."""
    parser.add_argument("bundle", metavar="BUNDLE", help="failure-STEP.pt of a run folder")
    parser.add_argument(
        "--dtype",
        action="append",
        default=[],
        choices=["float32", "float64", "bfloat16", "float16"],
        help="precision beside that of the run; may be given again (default: float32)",
    )
    parser.add_argument("--device", default="cpu", help="where (default: cpu)")


def run(args: Namespace) -> int:
    """Make it and report."""
    from vjepa_fast.trainer import replay

    *_, lines = replay.run(args.bundle, args.dtype, args.device)
    say(*lines)
    return 0
