"""``vjepa-fast train --videos DIR``: from a folder of videos to the configuration of a run."""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from vjepa_fast.cli._arguments import positive_real
from vjepa_fast.cli._console import say

if TYPE_CHECKING:
    from vjepa_fast.config import Config
    from vjepa_fast.trainer.own_videos import Prepared

RECIPE = "own_videos"
_SHOWN = 5  # files left out that are named on the screen; all are in quarantine.jsonl


def add_videos(parser: argparse.ArgumentParser) -> None:
    """Declare ``--videos`` and ``--minutes``."""
    parser.add_argument(
        "--videos",
        metavar="DIR",
        help=f"train on the videos in this folder and below; without a recipe: {RECIPE}, in a size that fits",
    )
    parser.add_argument(
        "--minutes",
        type=positive_real,
        default=60.0,
        metavar="M",
        help="--videos without a recipe: how long the steps may take (default %(default)g)",
    )


def folder_of(args: argparse.Namespace, overrides: Sequence[str]) -> Path:
    """The run folder. ConfigError for what is wrong with the flags, before any file is read."""
    from vjepa_fast import config

    return Path(args.folder or config.load(args.config or RECIPE, overrides).folder)


def configured(args: argparse.Namespace, overrides: Sequence[str]) -> Config:
    """The configuration of a run on ``--videos``; what there is to train on lies in ``data/`` of the run folder.

    A run that has begun goes on as it was.

    Raises:
        UserError: no video can be read, or the run folder is of other videos.
    """
    from vjepa_fast import config
    from vjepa_fast.config.given import folder_override
    from vjepa_fast.errors import UserError
    from vjepa_fast.trainer.own_videos import made_from

    recipe, folder = args.config or RECIPE, folder_of(args, overrides)
    before = made_from(folder / "data")
    if not args.no_resume and (folder / "config.yaml").is_file():
        if before is None or before != os.path.abspath(os.path.expanduser(args.videos)):
            raise UserError(
                f"{folder}: holds a run on {before or 'other data'}; name another folder with --out, or start over "
                "in it with --no-resume"
            )
        return config.load(folder, [*overrides, folder_override(folder)])
    prepared = _prepare(args.videos, folder)
    own = [*overrides, folder_override(folder)]
    if recipe != RECIPE:
        frames = config.load(recipe, overrides).data.dataset_fpcs[0]
        return config.load(recipe, [*prepared.overrides, f"data.dataset_fpcs=[{frames}]", *own])
    return _chosen(args, prepared, own)


def _prepare(videos: str, folder: Path) -> Prepared:
    from vjepa_fast.cli._console import counting
    from vjepa_fast.trainer.own_videos import prepare_videos

    with counting() as on_progress:
        found = prepare_videos(videos, folder / "data", on_progress=on_progress)
    _say(f"{videos}: {found.videos} videos, {_hours(found.hours)}; listed in {found.manifest}")
    for path, reason in found.left_out[:_SHOWN]:
        _say(f"left out: {path}: {reason}".encode(errors="backslashreplace").decode())
    if len(found.left_out) > _SHOWN:
        _say(f"left out: {len(found.left_out) - _SHOWN} more, in {folder / 'data' / 'quarantine.jsonl'}")
    for note in found.notes:
        _say(f"note: {note}")
    return found


def _chosen(args: argparse.Namespace, prepared: Prepared, own: list[str]) -> Config:
    from vjepa_fast.trainer.sizes import choose, cores, read_sizes

    _say("measuring a few steps of models that may fit ...")
    workers = f"data.num_workers={max(1, min(8, cores() - 1))}"
    sizes = [size for size in read_sizes() if size.set["data.dataset_fpcs"][0] <= prepared.frames]
    choice = choose(
        RECIPE, [*prepared.overrides, workers], own=own, minutes=args.minutes, steps=args.steps, sizes=sizes
    )
    _say(f"chosen for --minutes {args.minutes:g}: {choice}")
    return choice.cfg


def _hours(hours: float) -> str:
    return f"{hours:.1f} h" if hours >= 1 else f"{60 * hours:.1f} min" if hours >= 1 / 60 else f"{3600 * hours:.0f} s"


def _say(text: str) -> None:
    say(text, err=True)
