"""``vjepa-fast export``: take an encoder out, in a form that other programs read."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace

from vjepa_fast.cli import _arguments as arguments
from vjepa_fast.cli._console import say

HELP = "write an encoder for other programs (safetensors, FAIR, Hugging Face, ONNX, torch.export), and compare"


def add_arguments(parser: ArgumentParser) -> None:
    """Add the flags."""
    parser.add_argument(
        "checkpoint",
        metavar="CHECKPOINT_OR_RUN",
        help="a .pt or .safetensors file, a run folder (its newest checkpoint) or a Hugging Face folder",
    )
    parser.add_argument("--to", metavar="FORMAT", required=True, help="safetensors, fair, hf, onnx or torch-export")
    parser.add_argument("--out", metavar="PATH", required=True, help="the file, or for hf the folder; must not exist")
    arguments.add_one_encoder(parser)
    parser.add_argument("--num-frames", type=arguments.positive, help="of a clip of the graph; default: as trained")
    parser.add_argument("--crop-size", type=arguments.positive, help="its pixels per side; default: as trained")


def run(args: Namespace) -> int:
    """Write, compare, and say so."""
    from vjepa_fast.export import FORMATS, export_encoder
    from vjepa_fast.models import load_encoder

    FORMATS.get_named(args.to, "--to")
    given = {"num_frames": args.num_frames, "img_size": args.crop_size}
    given = {key: value for key, value in given.items() if value is not None}
    encoder = load_encoder(args.checkpoint, args.which, config=args.config, **given)
    done = export_encoder(encoder, args.to, args.out, which=args.which or "target_encoder")
    clips = " and ".join(f"[{','.join(map(str, shape))}]" for shape in done.clips)
    allowed = f"{done.tolerance:g} of the largest value" if done.tolerance else "none"
    say(f"{done.path}: {done.what}")
    say(
        f"read back and compared on {clips}: largest difference {done.difference:.3g} at values up to "
        f"{done.largest:.3g} (allowed: {allowed})"
    )
    return 0
