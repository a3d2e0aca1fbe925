"""Arguments that several commands share: types that check one value, and groups of flags with one meaning.

A type raises ``argparse.ArgumentTypeError``; the parser puts the name of the flag before its text.
"""

from __future__ import annotations

import math
import os
from argparse import ArgumentParser, ArgumentTypeError, Namespace
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

ENCODERS = ("target_encoder", "encoder")
POOLINGS = ("mean", "time", "meanstd", "tdiff", "sal")

# ---------------------------------------------------------------- types


def at_least(low: int) -> Callable[[str], int]:
    """An integer of at least ``low``."""

    def integer(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            raise ArgumentTypeError(f"{text!r} is not an integer") from None
        if value < low:
            raise ArgumentTypeError(f"{value} is not a positive number" if low == 1 else f"{value} is less than {low}")
        return value

    return integer


positive = at_least(1)


def positive_real(text: str) -> float:
    """A finite number above 0."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise ArgumentTypeError(f"{text} is not a positive number")
    return value


def names(text: str) -> list[str]:
    """Names with commas between, such as ``a,b``; blanks around them do not count."""
    return [name.strip() for name in text.split(",") if name.strip()]


def some_names(text: str) -> list[str]:
    """As `names`, at least one."""
    if not (found := names(text)):
        raise ArgumentTypeError("expected names with commas between, got none")
    return found


def writable_file(text: str) -> str:
    """The path of a file that can be written, since what it is for takes long."""
    folder = os.path.dirname(os.path.abspath(text))
    if not os.path.isdir(folder) or not os.access(folder, os.W_OK) or os.path.isdir(text):
        raise ArgumentTypeError(f"{text}: cannot be written; choose a file in a folder that exists and is writable")
    return text


def manifest_file(text: str) -> str:
    """The path of a manifest that exists, or .tar shards."""
    from vjepa_fast.data.members import names_shards

    if not (os.path.isfile(text) or names_shards(text)):
        raise ArgumentTypeError(f"{text}: no such manifest; `vjepa-fast data manifest DIR` writes one")
    return text


# ---------------------------------------------------------------- flags


def add_device(parser: ArgumentParser, default: str = "auto") -> None:
    """``--device``, to be read with `device_of`."""
    parser.add_argument("--device", default=default, help="auto, cpu, cuda, cuda:N or mps (default %(default)s)")


def add_json(parser: ArgumentParser, what: str = "the rows") -> None:
    """``--json PATH``."""
    parser.add_argument("--json", metavar="PATH", type=writable_file, help=f"also write {what} to a file")


def add_overrides(parser: ArgumentParser, what: str = "one value") -> None:
    """``--set KEY=VALUE``, as ``overrides``."""
    parser.add_argument(
        "--set",
        dest="overrides",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help=f"override {what}, such as optimization.lr=3e-4; may be repeated",
    )


def add_encoders(parser: ArgumentParser) -> None:
    """The checkpoint, which of its encoders, and their control; to be read with `subject_of`, as ``--device``."""
    parser.add_argument(
        "checkpoint",
        metavar="CHECKPOINT_OR_RUN",
        help="a .pt or .safetensors file, a run folder (its newest checkpoint) or a Hugging Face folder",
    )
    parser.add_argument(
        "--which", choices=("both", *ENCODERS), default="both", help="EMA target, student, or both (default)"
    )
    parser.add_argument(
        "--config",
        help="recipe or YAML, in place of the checkpoint's own; with weights that hold none (FAIR, Hugging Face) it "
        "wins over what is read off them, and the random-init control needs it",
    )
    parser.add_argument("--no-random", action="store_true", help="leave the random-init control out")


def add_one_encoder(parser: ArgumentParser) -> None:
    """Which encoder of a file is read, and what it is where the file does not say: ``--which`` (None: the one that was
    trained) and ``--config``.
    """
    parser.add_argument(
        "--which",
        choices=ENCODERS,
        help="EMA target (default) or student (default of runs with target.mode frozen); files with one encoder hold a "
        "target_encoder",
    )
    parser.add_argument("--config", help="recipe or YAML, for weights that do not say what they are")


def add_readout(parser: ArgumentParser, example: str) -> None:
    """``--readout``, checked with `check_readout`."""
    parser.add_argument(
        "--readout",
        metavar="auto|NAME",
        help=f"in place of --pooling and --level: chosen for each encoder on validation data (auto), or e.g. {example}",
    )


def check_readout(args: Namespace, *flags: tuple[str, Any]) -> None:
    """ConfigError where ``--readout`` is given beside a flag that it replaces; ``flags``: (flag, its default)."""
    from vjepa_fast.errors import ConfigError

    for flag, default in (("--pooling", "time"), ("--level", "last"), *flags):
        if args.readout and getattr(args, flag.lstrip("-").lower()) != default:
            raise ConfigError(f"{flag} is part of a readout; leave it out beside --readout {args.readout}")


def add_clips(parser: ArgumentParser) -> None:
    """How clips are read: frames, size and step, and how many at once."""
    parser.add_argument("--num-frames", type=positive, help="default: as trained")
    parser.add_argument("--crop-size", type=positive, help="pixels; default: as trained")
    parser.add_argument("--frame-step", type=positive, help="default: as trained")
    parser.add_argument("--batch-size", type=positive, default=16, help="clips at once (default %(default)s)")


def add_root(parser: ArgumentParser) -> None:
    """Where the paths of manifests start from."""
    parser.add_argument(
        "--root", metavar="DIR", help="as data.root: paths in manifests start from it and may not lead out of it"
    )


def add_images(parser: ArgumentParser) -> None:
    """How still images are read."""
    parser.add_argument(
        "--images",
        choices=("repeat", "single"),
        default="repeat",
        help="still images as standing clips (default) or through the image embedding",
    )


def add_features(parser: ArgumentParser) -> None:
    """What features are taken of the clips, and where they are kept."""
    parser.add_argument(
        "--pooling",
        choices=(*POOLINGS, "cls"),
        default="time",
        help="over all tokens; over space with time steps side by side (default); mean and std; "
        "tdiff and sal: with differences over time; cls: the class token, where there is one",
    )
    parser.add_argument("--level", choices=("last", "all"), default="last", help="last encoder level (default) or all")
    add_images(parser)
    parser.add_argument("--workers", type=at_least(0), default=0, help="decoding processes (default %(default)s)")
    parser.add_argument("--cache", metavar="DIR", help="folder for features (default: features/ in the run folder)")
    parser.add_argument("--no-cache", action="store_true", help="keep no features")


# ---------------------------------------------------------------- what the flags say


def subject_of(args: Namespace) -> dict[str, Any]:
    """Whose encoders are measured, where and with which cache: fields of `evaluation.run.encoders.Subject`."""
    from vjepa_fast import config
    from vjepa_fast.evaluation.run.encoders import cache_folder

    return {
        "path": args.checkpoint,
        "which": ENCODERS if args.which == "both" else (args.which,),
        "config": config.load(args.config) if args.config else None,
        "random": not args.no_random,
        "device": device_of(args.device),
        # without --cache and --no-cache a command keeps no features
        "cache_dir": None if getattr(args, "no_cache", True) else args.cache or cache_folder(args.checkpoint),
    }


def device_of(name: str) -> torch.device:
    """The device that ``--device`` names; UserError where it cannot be used here."""
    import torch

    from vjepa_fast.errors import UserError
    from vjepa_fast.files import first_line

    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"--device {name}: cannot be used here ({first_line(error)})") from None
    return device
