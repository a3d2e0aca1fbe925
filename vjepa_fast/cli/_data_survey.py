"""Tables of ``vjepa-fast data check``: what kinds of file there are, and how fast they are read."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import TYPE_CHECKING

from vjepa_fast.cli._console import new_table, plain, say, table_console

if TYPE_CHECKING:
    from vjepa_fast.data.manifests.manifest import Manifest


def add_survey(check: argparse.ArgumentParser) -> None:
    """Declare the options of the tables."""
    check.add_argument(
        "--crop-size", type=int, default=224, help="of clips when speed is measured (default %(default)s)"
    )
    check.add_argument(
        "--speed", type=float, default=1.0, metavar="SECONDS", help="to measure each decoder for; 0: not (default 1)"
    )


def print_survey(args: argparse.Namespace, manifest: Manifest, bad: Sequence[str]) -> None:
    """Print kinds of file, clips per second of each decoder, and what an epoch takes at least."""
    from vjepa_fast.data.survey import kinds

    console = table_console()
    numbers = ("files", "size", "height", "frames/s", "frames", "key frame every")
    table = new_table("", ["codec", "container", *numbers], numbers, wraps="container")
    for kind in kinds(manifest, bad):
        ranges = (_range(values) for values in (kind.size, kind.rate, kind.frames, kind.gop))
        table.add_row(plain(kind.codec), plain(kind.container), str(kind.files), _bytes(kind.bytes), *ranges)
    if table.row_count:
        console.print(table)
    if args.speed > 0 and len(bad) < len(manifest):
        _print_speed(args, manifest)


def _print_speed(args: argparse.Namespace, manifest: Manifest) -> None:
    import os

    from vjepa_fast.config.schema import DataConfig
    from vjepa_fast.data.survey import speeds

    data = DataConfig(
        dataset_fpcs=(args.frames,),
        crop_size=args.crop_size,
        frame_sample_rate=args.frame_step,
        fps=args.fps,
        duration=args.duration,
        corrupt=args.corrupt,
    )
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    for speed in speeds(manifest, data, args.speed):
        if speed.why:
            say(f"{speed.decoder}: not measured: {speed.why}")
            continue
        hours = len(manifest) / speed.clips_per_s / cores / 3600
        say(
            f"{speed.decoder}: {speed.clips_per_s:.1f} clips/s in one thread; "
            f"to read {len(manifest)} samples takes at least {_time(hours)} on the {cores} CPU cores here"
        )


def _range(values: tuple[float, float] | None) -> str:
    if values is None:
        return ""
    least, most = (f"{value:.4g}" for value in values)
    return least if least == most else f"{least} to {most}"


def _bytes(number: int) -> str:
    unit, name = next(((u, n) for u, n in ((1e12, "TB"), (1e9, "GB"), (1e6, "MB")) if number >= u), (1e3, "kB"))
    return f"{number / unit:.3g} {name}"


def _time(hours: float) -> str:
    return f"{hours:.1f} h" if hours >= 1 else f"{60 * hours:.1f} min" if hours >= 1 / 60 else f"{3600 * hours:.0f} s"
