"""``vjepa-fast data show``: a contact sheet of clips and masks as training gets them."""

from __future__ import annotations

import argparse
from typing import Any

from vjepa_fast.cli._arguments import add_overrides, at_least, positive, writable_file
from vjepa_fast.cli._console import say


def add_show(commands: Any) -> None:
    """Declare ``show`` among the subcommands of ``data``."""
    show = commands.add_parser(
        "show",
        help="write a contact sheet of clips and masks as training sees them",
        description="Writes a page (.html, all in one file) or a picture (.png) of the first clips of a training step: "
        "decoded, upright, cropped and mirrored as training does, frame numbers and times under them, and "
        "below them which tokens are context and which are predicted.",
    )
    show.add_argument("manifest", help="manifest of videos or images, or .tar shards")
    show.add_argument(
        "--recipe", metavar="R", help="recipe name, YAML file or run folder (default: a recipe's defaults)"
    )
    add_overrides(show)
    show.add_argument("--out", type=writable_file, default="sheet.html", help=".html or .png (default %(default)s)")
    show.add_argument("--clips", type=positive, default=8, help="how many, at most a batch (default %(default)s)")
    show.add_argument("--step", type=at_least(0), default=0, help="of the run (default %(default)s)")
    show.set_defaults(run=_show)


def _show(args: argparse.Namespace) -> int:
    from vjepa_fast import config
    from vjepa_fast.study.sheet.read import read_sheet
    from vjepa_fast.study.sheet.write import check_name, write_sheet

    check_name(args.out)
    first = [] if args.recipe is not None else [f"data.batch_size={args.clips}"]
    cfg = config.load(args.recipe, [*first, *args.overrides])
    sheet = read_sheet(cfg, args.manifest, clips=args.clips, step=args.step)
    write_sheet(sheet, args.out)
    say(f"{args.out}: {len(sheet.clips)} clips of step {args.step}, {len(sheet.bad)} unreadable")
    return 0
