"""``vjepa-fast geometry``: how much of their space a frozen encoder's features use, beside random weights."""

from __future__ import annotations

HELP = "collapse figures of a checkpoint: RankMe, LiDAR, alpha-ReQ per level and half"


def add_arguments(parser) -> None:
    parser.add_argument(
        "checkpoint", metavar="CHECKPOINT_OR_RUN", help="a .pt file, or a run folder (its newest checkpoint)"
    )
    parser.add_argument("--data", metavar="CSV", required=True, help="manifest of the clips")
    parser.add_argument(
        "--which",
        choices=("both", "target_encoder", "encoder"),
        default="both",
        help="EMA target, student, or both (default)",
    )
    parser.add_argument(
        "--split",
        choices=("depth", "channel"),
        default="depth",
        help="appearance and dynamics: halves of the concatenated levels (default) or of every level",
    )
    parser.add_argument("--views", type=int, default=8, help="views of a clip for LiDAR (default %(default)s; 0: none)")
    parser.add_argument("--max-clips", type=int, default=256, help="drawn from the manifest (default %(default)s)")
    parser.add_argument("--num-frames", type=int, help="default: as trained")
    parser.add_argument("--crop-size", type=int, help="pixels; default: as trained")
    parser.add_argument("--frame-step", type=int, help="default: as trained")
    parser.add_argument(
        "--extra-frames", type=int, default=0, help="read so many more; views start at any (default %(default)s)"
    )
    parser.add_argument("--batch-size", type=int, default=16, help="clips at once (default %(default)s)")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:N or mps (default %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of clips and views (default %(default)s)")
    parser.add_argument("--config", help="recipe or YAML of a checkpoint that holds no configuration (FAIR weights)")
    parser.add_argument("--no-random", action="store_true", help="leave the random-init control out")
    parser.add_argument("--json", metavar="PATH", help="also write the rows to a file")


def run(args) -> int:
    _check(args)
    from rich.console import Console

    from vjepa_fast import config as configs
    from vjepa_fast.cli.probe import _device
    from vjepa_fast.evaluation.run.checkpoint import WHICH
    from vjepa_fast.evaluation.run.geometry import checkpoint_geometry

    with Console(stderr=True).status("reading") as status:
        rows = checkpoint_geometry(
            args.checkpoint,
            args.data,
            which=WHICH if args.which == "both" else (args.which,),
            config=configs.load(args.config) if args.config else None,
            random=not args.no_random,
            device=_device(args.device),
            num_frames=args.num_frames,
            crop_size=args.crop_size,
            frame_step=args.frame_step,
            extra_frames=args.extra_frames,
            on_progress=status.update,
            split=args.split,
            views=args.views,
            max_clips=args.max_clips,
            batch_size=args.batch_size,
            seed=args.seed,
        )
    print_table(rows)
    if args.json:
        _write_json(args, rows)
    return 0


def _check(args) -> None:
    import os

    from vjepa_fast.errors import UserError

    least = {"views": 0, "max_clips": 2, "num_frames": 1, "crop_size": 1, "frame_step": 1, "extra_frames": 0}
    for name, low in {**least, "batch_size": 1, "seed": 0}.items():
        value = getattr(args, name)
        if value is not None and value < low:
            raise UserError(f"--{name.replace('_', '-')}: {value} is less than {low}")
    if args.json:
        folder = os.path.dirname(os.path.abspath(args.json))
        if not os.path.isdir(folder) or not os.access(folder, os.W_OK) or os.path.isdir(args.json):
            raise UserError(f"{args.json}: cannot be written; choose a file in a folder that exists and is writable")


def print_table(rows: list[dict]) -> None:
    """Rows as a table on stdout, then the reasons for what is missing."""
    from rich.console import Console
    from rich.table import Table

    first = rows[0]
    title = f"Geometry of {first['clips']} clips ({first['views']} views for LiDAR, {first['split']} split)"
    table = Table(title=title)
    metrics = {
        "rankme": "RankMe",
        "lidar": "LiDAR",
        "alpha_req": "alpha-ReQ",
        "feature_std": "std",
        "mean_cosine": "mean cosine",
    }
    for name, justify in (
        ("encoder", "left"),
        ("level", "right"),
        ("part", "left"),
        ("channels", "right"),
        *((title, "right") for title in metrics.values()),
    ):
        table.add_column(name, justify=justify, no_wrap=name != "encoder")
    for i, r in enumerate(rows):
        figures = ["-" if r[k] is None else f"{r[k]:.3g}" if abs(r[k]) < 1 else f"{r[k]:.2f}" for k in metrics]
        table.add_row(
            r["encoder"],
            str(r["level"]),
            r["subspace"],
            str(r["dim"]),
            *figures,
            end_section=i + 1 < len(rows) and rows[i + 1]["encoder"] != r["encoder"],
        )
    console = Console()  # a pipe has no width: give it one that wraps nothing
    console = console if console.is_terminal else Console(width=140)
    console.print(table)
    for warning in dict.fromkeys(w for r in rows for w in r["warnings"]):
        console.print(warning)
    for metric, reason in dict.fromkeys(pair for r in rows for pair in r["why"].items()):
        console.print(f"no {metrics[metric]}: {reason}")


def _write_json(args, rows: list[dict]) -> None:
    import json
    import os

    content = {"checkpoint": os.path.abspath(args.checkpoint), "data": args.data, "seed": args.seed, "rows": rows}
    temporary = args.json + ".tmp"
    with open(temporary, "w", encoding="utf-8") as file:
        json.dump(content, file, indent=1)
    os.replace(temporary, args.json)
