"""``vjepa-fast data``: make manifests of your own videos, and check them."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from vjepa_fast.cli._arguments import add_root, writable_file
from vjepa_fast.cli._console import say
from vjepa_fast.cli._data_show import add_show
from vjepa_fast.cli._data_survey import add_survey, print_survey

HELP = "make manifests of a folder of videos or images, check them, and show what training sees"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare ``manifest``, ``check`` and ``show``."""
    commands = parser.add_subparsers(dest="data_command", required=True, metavar="{manifest,check,show}")
    make = commands.add_parser(
        "manifest",
        help="write manifests for DIR/<class>/<file>, or DIR/{train,val,test}/<class>/<file>",
        description="Writes CSV manifests of '<path> <label>' lines for a folder of class folders, and the class names "
        "as JSON. Paths are relative to the manifest, so that folder and manifest can move together; with "
        "--absolute the manifest can move alone, and is read by other V-JEPA code too.",
    )
    make.add_argument("dir", help="folder of class folders (files directly in it all get label 0)")
    make.add_argument("--out", help="the (training) manifest; others go beside it (default DIR/train.csv)")
    make.add_argument("--val-fraction", type=float, default=0.0, help="share of every class for a validation manifest")
    make.add_argument("--test-fraction", type=float, default=0.0, help="share of every class for a test manifest")
    make.add_argument("--absolute", action="store_true", help="write absolute paths")
    make.add_argument("--seed", type=int, default=0, help="of the split (default %(default)s)")
    check = commands.add_parser("check", help="read a clip of every sample and list those that cannot be read")
    check.add_argument("manifest", help="manifest to check")
    add_root(check)
    check.add_argument("--frames", type=int, default=16, help="frames per clip (default %(default)s)")
    check.add_argument("--frame-step", type=int, help="frames from one to the next (default 1)")
    check.add_argument("--fps", type=int, help="frames per second to read at, in place of --frame-step")
    check.add_argument("--duration", type=float, help="seconds that a clip spans, in place of --frame-step")
    check.add_argument("--full", action="store_true", help="decode every frame of every video")
    check.add_argument(
        "--corrupt", choices=("refuse", "keep"), default="refuse", help="as data.corrupt in a recipe (default refuse)"
    )
    check.add_argument("--decoder", default="auto", help="as data.decoder in a recipe (default %(default)s)")
    check.add_argument("--workers", type=int, default=2, help="threads (default %(default)s)")
    check.add_argument(
        "--write-clean", metavar="OUT", type=writable_file, help="write a manifest without the unreadable samples"
    )
    add_survey(check)
    make.set_defaults(run=_manifest)
    check.set_defaults(run=_check)
    add_show(commands)


def run(args: argparse.Namespace) -> int:
    """Write manifests, check one or show it; the exit code."""
    return args.run(args)


def _manifest(args: argparse.Namespace) -> int:
    from vjepa_fast.data.manifests.scan import scan_folder

    options = ("out", "val_fraction", "test_fraction", "absolute", "seed")
    written = scan_folder(args.dir, **{k: getattr(args, k) for k in options})
    for part, facts in written.items():
        say(f"{part}: {facts['samples']} samples of {facts['classes']} classes, {facts['path']}")
    first = written.get("train", next(reversed(written.values())))
    say(f"check it:  vjepa-fast data check {first['path']}")
    return 0


def _check(args: argparse.Namespace) -> int:
    from vjepa_fast.data.manifests.check import check_manifest, keep_indices
    from vjepa_fast.data.manifests.clean import write_clean
    from vjepa_fast.data.manifests.manifest import load_manifest
    from vjepa_fast.data.manifests.root import Root
    from vjepa_fast.data.media import ReadOptions
    from vjepa_fast.data.sampling import Sampling
    from vjepa_fast.errors import DataError

    manifest = load_manifest(args.manifest, Root.given(args.root))
    with _progress(len(manifest)) as on_progress:
        bad = check_manifest(
            manifest,
            num_frames=args.frames,
            sampling=Sampling(args.frame_step, args.fps, args.duration),
            full=args.full,
            workers=args.workers,
            decoder=args.decoder,
            options=ReadOptions(corrupt=args.corrupt),
            on_progress=on_progress,
        )
    paths = [path for path, _ in bad]
    kept = None if args.write_clean is None else write_clean(manifest, paths, args.write_clean)
    for _, reason in bad:
        say(f"bad: {reason}")
    say(
        f"{manifest.path}: {len(manifest)} {manifest.kind} samples of {len(set(manifest.labels.tolist()))} classes, "
        f"{len(bad)} unreadable"
    )
    for note in keep_indices(manifest):
        say(f"note: {note}")
    print_survey(args, manifest, paths)
    if kept is not None:
        say(f"{args.write_clean}: {kept} samples that can be read")
        return 0
    if bad:
        raise DataError(
            f"{manifest.path}: {len(bad)} of {len(manifest)} samples cannot be read (listed above); "
            "repair them, or leave them out: --write-clean OUT"
        )
    return 0


@contextmanager
def _progress(total: int) -> Iterator[Callable[[float], None]]:
    """A function that takes the number of samples done, and shows it with the time left: a bar, or a line a minute."""
    import sys
    import time

    from rich.console import Console
    from rich.progress import Progress

    begin = said = time.monotonic()

    def show(done: float) -> None:
        nonlocal said
        progress.update(task, completed=done)
        now = time.monotonic()
        if progress.disable and now - said > 60 and done:
            said, left = now, (now - begin) * (total - done) / done / 60
            say(f"{done:.1f} of {total} samples, about {left:.0f} min left", err=True)

    with Progress(console=Console(stderr=True), transient=True, disable=not sys.stderr.isatty()) as progress:
        task = progress.add_task("reading", total=total)
        yield show
