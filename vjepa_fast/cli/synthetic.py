"""``vjepa-fast synthetic``: render synthetic suites to real video and image files."""

from __future__ import annotations

import argparse

from vjepa_fast.cli._console import say

HELP = "render synthetic suites to .mp4 (or .rows) and .jpg with manifests"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare what to render and where to."""
    parser.add_argument(
        "suite",
        metavar="SUITE",
        help="motion8, dive, order, objects, fewshot or a plugin's; all renders each to a folder of its name",
    )
    parser.add_argument("out", help="folder to write")
    parser.add_argument("--train", type=int, default=1000, help="clips of the training part (default %(default)s)")
    parser.add_argument("--val", type=int, default=200, help="clips of the validation part (default %(default)s)")
    parser.add_argument("--test", type=int, default=400, help="clips of the test part (default %(default)s)")
    parser.add_argument("--size", type=int, default=64, help="pixels of each side (default %(default)s)")
    parser.add_argument("--frames", type=int, default=16, help="frames of each video (default %(default)s)")
    parser.add_argument("--fps", type=int, default=8, help="frames per second of each video (default %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="the same seed gives the same files (default %(default)s)")
    parser.add_argument(
        "--form",
        choices=("mp4", "rows"),
        default="mp4",
        help="of videos: mp4 (H.264, default), or rows (every pixel as it is; larger, read much faster)",
    )
    parser.add_argument("--workers", type=int, default=2, help="processes (default %(default)s)")


def run(args: argparse.Namespace) -> int:
    """Render; the exit code."""
    import os
    import sys

    from rich.console import Console
    from rich.progress import Progress

    from vjepa_fast.data.synthetic import SUITES, render_suite

    splits = {"train": args.train, "val": args.val, "test": args.test}
    written = {}
    with Progress(console=Console(stderr=True), transient=True, disable=not sys.stderr.isatty()) as progress:
        for name in SUITES if args.suite == "all" else (args.suite,):
            task = progress.add_task(name, total=sum(splits.values()))
            folder = os.path.join(args.out, name) if args.suite == "all" else args.out
            written[name] = render_suite(
                name,
                folder,
                splits=splits,
                **{k: getattr(args, k) for k in ("size", "frames", "fps", "seed", "workers", "form")},
                on_progress=lambda done, total, task=task: progress.update(task, completed=done),
            )
    for name, manifests in written.items():
        for split, path in manifests.items():
            say(f"{name} {split}: {splits[split]} clips, manifest {path}")
    return 0
