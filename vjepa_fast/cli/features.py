"""``vjepa-fast features``: the features of one's own videos, in a file that other programs read."""

from __future__ import annotations

from argparse import ArgumentParser, ArgumentTypeError, Namespace

from vjepa_fast.cli import _arguments as arguments
from vjepa_fast.cli._console import say

HELP = "write features of your videos, by any encoder, as safetensors"


def levels(text: str) -> str | list[int]:
    """``last``, ``all``, or numbers with commas between."""
    if text in ("last", "all"):
        return text
    try:
        return [int(number) for number in arguments.some_names(text)]
    except ValueError:
        raise ArgumentTypeError(f"{text!r}: expected last, all, or numbers such as 1,3") from None


def share(text: str) -> float:
    """A number from 0 to 1."""
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value <= 1:
        raise ArgumentTypeError(f"{text}: expected a share from 0 to 1")
    return value


def add_arguments(parser: ArgumentParser) -> None:
    """Add the flags."""
    positive = arguments.positive
    parser.add_argument(
        "videos", metavar="VIDEO|DIR|MANIFEST", nargs="+", help="videos or images, folders (and all below), manifests"
    )
    parser.add_argument(
        "--encoder",
        metavar="CHECKPOINT_OR_RUN",
        required=True,
        help="a run folder, a .pt or .safetensors file (FAIR's too), or a Hugging Face folder",
    )
    parser.add_argument("--out", metavar="PATH", type=safetensors_file, required=True, help="the .safetensors file")
    arguments.add_one_encoder(parser)
    arguments.add_root(parser)
    parser.add_argument(
        "--pooling",
        choices=(*arguments.POOLINGS, "cls", "none"),
        default="mean",
        help="mean over all tokens (default), mean and std, per time step, with differences over time (tdiff, sal), "
        "cls: the class token, where there is one, or none: every token",
    )
    parser.add_argument(
        "--level", type=levels, default="last", metavar="last|all|N,N", help="encoder levels, from 0 (default: last)"
    )
    parser.add_argument("--clips", type=positive, default=1, help="per video, spread over it (default: the middle one)")
    parser.add_argument("--crops", type=positive, default=1, help="per clip (default: the middle one)")
    parser.add_argument("--keep-clips", action="store_true", help="one row per clip and crop, not their mean")
    arguments.add_clips(parser)
    parser.add_argument(
        "--short",
        choices=("refuse", "hold"),
        default="refuse",
        help="videos shorter than a clip: left out (default), or with their last frame held",
    )
    arguments.add_images(parser)
    parser.add_argument(
        "--precision",
        choices=("float32", "bfloat16", "float16"),
        help="of the encoder's products (default: bfloat16 on a GPU, float32 elsewhere)",
    )
    parser.add_argument(
        "--storage",
        choices=("float32", "bfloat16", "float16"),
        default="float32",
        help="of the features in the file (default %(default)s)",
    )
    parser.add_argument("--workers", type=arguments.at_least(0), default=0, help="reading threads (default 0)")
    parser.add_argument(
        "--max-bad", type=share, default=0.05, metavar="SHARE", help="unreadable share accepted (default %(default)s)"
    )
    arguments.add_device(parser)


def safetensors_file(text: str) -> str:
    """The path of a .safetensors file that can be written."""
    if not text.endswith(".safetensors"):
        raise ArgumentTypeError(f"{text}: expected a name that ends in .safetensors")
    return arguments.writable_file(text)


def run(args: Namespace) -> int:
    """Read, encode, write, and say what is in the file."""
    import os

    import torch

    from vjepa_fast.cli._console import counting
    from vjepa_fast.evaluation import video_features
    from vjepa_fast.models import load_encoder

    device = arguments.device_of(args.device)
    encoder = load_encoder(args.encoder, args.which, config=args.config)
    names = ("pooling", "level", "clips", "crops", "num_frames", "crop_size", "frame_step", "short", "images")
    names += ("batch_size", "storage", "workers", "max_bad", "root")
    how = {name: getattr(args, name) for name in names}
    with counting() as show:
        found = video_features(
            encoder,
            args.videos,
            device=device,
            over_clips="keep" if args.keep_clips else "mean",
            dtype=getattr(torch, args.precision) if args.precision else None,
            on_progress=lambda done, total: show("encoding", done, total),
            **how,
        )
    found.encoder.update(path=os.path.abspath(args.encoder), which=encoder.loaded_as)
    found.save(args.out)
    shape = ", ".join(map(str, found.x.shape))
    lost = f", {len(found.skipped)} left out" if found.skipped else ""
    say(f"{args.out}: features [{shape}] {args.storage} of {len(found)} videos{lost}, {found.settings['pooling']}")
    return 0
