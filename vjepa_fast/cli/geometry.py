"""``vjepa-fast geometry``: how much of their space a frozen encoder's features use, beside random weights."""

from __future__ import annotations

import json
import os
from argparse import ArgumentParser, Namespace

from vjepa_fast.cli import _arguments as arguments
from vjepa_fast.cli._console import new_table, plain, table_console
from vjepa_fast.files import write_text

HELP = "collapse figures of a checkpoint: RankMe, LiDAR, alpha-ReQ per level and half"


def add_arguments(parser: ArgumentParser) -> None:
    """Add the flags."""
    arguments.add_encoders(parser)
    parser.add_argument("--data", metavar="CSV", required=True, help="manifest of the clips")
    arguments.add_root(parser)
    parser.add_argument(
        "--split",
        choices=("depth", "channel"),
        default="depth",
        help="appearance and dynamics: halves of the concatenated levels (default) or of every level",
    )
    at_least = arguments.at_least
    parser.add_argument(
        "--views", type=at_least(0), default=8, help="views of a clip for LiDAR (default %(default)s; 0: none)"
    )
    parser.add_argument(
        "--max-clips", type=at_least(2), default=256, help="drawn from the manifest (default %(default)s)"
    )
    arguments.add_clips(parser)
    parser.add_argument(
        "--extra-frames",
        type=at_least(0),
        default=0,
        help="read so many more; views start at any (default %(default)s)",
    )
    parser.add_argument("--seed", type=at_least(0), default=0, help="of clips and views (default %(default)s)")
    arguments.add_device(parser)
    arguments.add_json(parser)


def run(args: Namespace) -> int:
    """Measure every encoder and print the table."""
    from rich.console import Console

    from vjepa_fast.evaluation.run.geometry import checkpoint_geometry

    settings = ("num_frames", "crop_size", "frame_step", "extra_frames", "batch_size")
    settings += ("split", "views", "max_clips", "seed", "root")
    with Console(stderr=True).status("reading") as status:
        rows = checkpoint_geometry(
            manifest=args.data,
            on_progress=status.update,
            **{k: getattr(args, k) for k in settings},
            **arguments.subject_of(args),
        )
    if args.json:
        content = {"checkpoint": os.path.abspath(args.checkpoint), "data": args.data, "root": args.root}
        write_text(args.json, json.dumps({**content, "seed": args.seed, "rows": rows}, indent=1))
    print_table(rows)
    return 0


def print_table(rows: list[dict]) -> None:
    """Rows as a table on stdout, then the reasons for what is missing."""
    from vjepa_fast.evaluation.run.geometry import METRICS

    first = rows[0]
    title = f"Geometry of {first['clips']} clips ({first['views']} views for LiDAR, {first['split']} split)"
    titles = ("RankMe", "LiDAR", "alpha-ReQ", "std", "mean cosine")
    metrics = dict(zip(METRICS, titles))
    numbers = ("channels", *metrics.values())
    table = new_table(title, ("encoder", "level", "part", *numbers), right=("level", *numbers))
    for i, r in enumerate(rows):
        figures = ["-" if r[k] is None else f"{r[k]:.3g}" if abs(r[k]) < 1 else f"{r[k]:.2f}" for k in metrics]
        table.add_row(
            plain(r["encoder"]),
            str(r["level"]),
            r["subspace"],
            str(r["dim"]),
            *figures,
            end_section=i + 1 < len(rows) and rows[i + 1]["encoder"] != r["encoder"],
        )
    console = table_console()
    console.print(table)
    for warning in dict.fromkeys(w for r in rows for w in r["warnings"]):
        console.print(plain(warning))
    for metric, reason in dict.fromkeys(pair for r in rows for pair in r["why"].items()):
        console.print(plain(f"no {metrics[metric]}: {reason}"))
