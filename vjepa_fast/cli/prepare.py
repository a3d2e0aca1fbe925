"""``vjepa-fast prepare``: from what a data set's download unpacks to, to manifests and fast copies."""

from __future__ import annotations

import argparse
import os
from fractions import Fraction
from typing import TYPE_CHECKING

from vjepa_fast.cli import _arguments as arguments
from vjepa_fast.cli._console import say

if TYPE_CHECKING:
    from vjepa_fast.data.prepare import CopyForm, Report

HELP = "write manifests, and fast copies, of UCF-101, Kinetics, SSv2, ... or your own files"
_SETS = (
    "ucf101, hmdb51, ssv2, diving48, imagenet100, kinetics400, fewshot, folder, videos, csv, webdataset, or one of a "
    "plugin"
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the flags."""
    parser.add_argument("name", metavar="NAME", help=_SETS)
    parser.add_argument("source", metavar="SOURCE", help="what the download was unpacked to; nothing in it changes")
    parser.add_argument("--out", metavar="DIR", help="what is written goes here (default prepared/NAME)")
    parser.add_argument("--lists", metavar="PATH", help="folder or file of the lists, where they are not below SOURCE")
    parser.add_argument(
        "--split", nargs="+", type=arguments.positive, default=[], metavar="N", help="official splits (default 1)"
    )
    parser.add_argument(
        "--val-fraction", type=float, default=0.0, metavar="F", help="folder: share of each class for validation"
    )
    parser.add_argument("--test-fraction", type=float, default=0.0, metavar="F", help="folder: and for the test")
    parser.add_argument(
        "--convert",
        nargs="?",
        const="h264",
        choices=("h264", "rows", "raw"),
        help="list fast copies instead: H.264 with a key frame every 16 (default); a JPEG per frame, or "
        "uint8, both read by memory map",
    )
    parser.add_argument(
        "--fps", type=_rate, help="frames per second of the copies: those of the run (default: as the video)"
    )
    parser.add_argument(
        "--frame-step", type=arguments.positive, default=1, help="instead of --fps: take every n-th frame (default 1)"
    )
    parser.add_argument(
        "--short-side", type=arguments.at_least(16), default=256, help="pixels; smaller videos stay (default 256)"
    )
    parser.add_argument(
        "--quality",
        type=arguments.positive,
        help="crf of h264 (default 20, lower is better); of JPEG (90, higher is better)",
    )
    parser.add_argument("--full", action="store_true", help="decode every frame of every file to find damage")
    parser.add_argument(
        "--deinterlace", action="store_true", help="in copies of interlaced videos, fill the second field"
    )
    parser.add_argument(
        "--workers", type=arguments.positive, default=os.cpu_count() or 1, help="processes (default: one per core)"
    )


def run(args: argparse.Namespace) -> int:
    """Prepare a data set; the exit code."""
    from pathlib import Path

    from vjepa_fast.cli._console import counting
    from vjepa_fast.data.media import ReadOptions
    from vjepa_fast.data.prepare import DATA_SETS, Request, prepare
    from vjepa_fast.errors import UserError

    kind = DATA_SETS.get_named(args.name, "prepare")
    if args.split and max(args.split) > kind.splits:
        many = f"has {kind.splits} official splits" if kind.splits else "has no official splits"
        raise UserError(f"--split {max(args.split)}: {args.name} {many}")
    if (args.val_fraction or args.test_fraction) and not kind.fractions:
        raise UserError(f"--val-fraction, --test-fraction: {args.name} has parts of its own")
    request = Request(
        source=Path(args.source),
        lists=Path(args.lists) if args.lists else None,
        out=Path(args.out or os.path.join("prepared", args.name)),
        splits=tuple(dict.fromkeys(args.split)),
        known=_known_classes(kind.task),
        val_fraction=args.val_fraction,
        test_fraction=args.test_fraction,
    )
    options = ReadOptions(deinterlace=args.deinterlace, max_seconds=600.0)
    with counting() as on_progress:
        report = prepare(
            args.name,
            request,
            form=_form(args),
            workers=args.workers,
            full=args.full,
            options=options,
            on_progress=on_progress,
        )
    _print(report)
    return 0


def _known_classes(task: str | None) -> list[str]:
    from vjepa_fast.evaluation.tasks import class_names, get_task

    return class_names(get_task(task)) if task else []


def _form(args: argparse.Namespace) -> CopyForm | None:
    from vjepa_fast.data.prepare import CopyForm
    from vjepa_fast.errors import UserError

    if args.convert is None:
        given = [flag for flag, value in (("--fps", args.fps), ("--quality", args.quality)) if value is not None]
        if given or args.frame_step != 1:
            raise UserError(f"{given[0] if given else '--frame-step'}: is for copies; add --convert")
        return None
    if args.fps is not None and args.frame_step != 1:
        raise UserError("--fps, --frame-step: give one of them")
    quality = args.quality or (20 if args.convert == "h264" else 90)
    if quality > (51 if args.convert == "h264" else 95):
        raise UserError(f"--quality {quality}: {'crf goes to 51' if args.convert == 'h264' else 'JPEG goes to 95'}")
    return CopyForm(args.convert, args.fps, args.frame_step, args.short_side, quality, args.deinterlace)


def _rate(text: str) -> Fraction:
    """A rate such as 8, 7.5 or 30000/1001."""
    try:
        rate = Fraction(text).limit_denominator(1001)
    except (ValueError, ZeroDivisionError):
        rate = Fraction(0)
    if not 0 < rate <= 1000:
        raise argparse.ArgumentTypeError(f"{text} is not a number of frames per second")
    return rate


def _print(report: Report) -> None:
    for part, facts in report.parts.items():
        lost = ", ".join(f"{facts[what]} {what}" for what in ("missing", "bad") if facts[what])
        say(
            f"{part}: {facts['samples']} samples of {facts['classes']} classes{f' ({lost})' if lost else ''}, "
            f"{facts['manifest']}"
        )
    codecs = [f"{number} {codec}" for codec, number in report.codecs.items()]
    say(
        f"{report.files} files found, {report.missing} missing, {report.bad} bad; {report.classes} classes"
        + (f"; {report.hours:.2f} h of video" if report.hours else "")
    )
    say(f"files: {'; '.join(codecs[:4])}{f'; {len(codecs) - 4} other forms' if len(codecs) > 4 else ''}")
    if report.copied_bytes:
        say(f"copies: {report.copied_bytes / 1e9:.2f} GB")
    if report.missing or report.bad:
        say(f"reasons: {os.path.join(report.out, 'quarantine.jsonl')}")
    for note in report.notes:
        say(f"note: {note}")
    first = next(iter(report.parts.values()))["manifest"]
    say(f"train on it:  vjepa-fast train RECIPE --set data.datasets=[{first}]")
