"""``vjepa-fast train``: pretrain from a recipe or a YAML file, or go on with a run that was stopped."""

from __future__ import annotations

import argparse
import dataclasses
from typing import TYPE_CHECKING

from vjepa_fast.cli._arguments import add_overrides, at_least, positive
from vjepa_fast.cli._console import say
from vjepa_fast.cli._train_flags import add_short_flags, scaled, short_overrides
from vjepa_fast.cli._train_videos import RECIPE, add_videos, configured, folder_of
from vjepa_fast.config.given import Given, blamed, folder_override
from vjepa_fast.errors import UserError

if TYPE_CHECKING:
    from vjepa_fast.config import Config
    from vjepa_fast.trainer.watch import MakeProbe

HELP = "pretrain an encoder from a recipe, a YAML file or a run folder"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The configuration, and what changes it for this run."""
    parser.add_argument(
        "config", nargs="?", help="YAML file (ours or published), recipe name, or run folder to go on with"
    )
    add_videos(parser)
    add_short_flags(parser)
    add_overrides(parser)
    parser.add_argument("--device", help="auto, cpu, cuda, cuda:N or mps (short for --set runtime.device=...)")
    parser.add_argument("--folder", "--out", help="where the run is written (short for --set folder=...)")
    parser.add_argument(
        "--init",
        metavar="PATH",
        help="weights to start from: a run folder, checkpoint, FAIR file or Hugging Face folder (sets init.path)",
    )
    parser.add_argument(
        "--no-resume", action="store_true", help="start over instead of going on from the folder's newest checkpoint"
    )
    parser.add_argument(
        "--no-fallback",
        action="store_true",
        help="refuse to go on from an earlier checkpoint where the newest is damaged",
    )
    parser.add_argument(
        "--max-steps",
        type=positive,
        metavar="N",
        help="stop after step N of the schedule; the next start goes on from there",
    )
    parser.add_argument(
        "--profile",
        type=at_least(0),
        nargs="?",
        const=5,
        default=0,
        metavar="N",
        help="profile N steps (default 5) after the first two: profile/ of the run folder gets a trace "
        "and a table of where the step went; training goes on",
    )


def run(args: argparse.Namespace) -> int:
    """Train; prints the folder and the newest checkpoint."""
    import os

    overrides = short_overrides(args) + list(args.overrides)
    if args.device is not None:
        overrides.append(Given(f"runtime.device={args.device}", f"--device {args.device}"))
    if args.config is None and args.videos is None:
        raise UserError("name a recipe, a YAML file or a run folder, or --videos DIR; see `vjepa-fast train --help`")
    overrides += scaled(args, args.config or RECIPE, overrides)
    if args.profile:  # torch's profiler logs a missing GPU as an error; read when torch is imported
        os.environ.setdefault("KINETO_LOG_LEVEL", "5")
    if "WORLD_SIZE" in os.environ:  # frames of C++ for each lost connection; likewise
        os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    if args.videos is None:
        return _train(args, _configured(args, overrides), overrides)
    from vjepa_fast.trainer.run_folder import nothing_left

    with nothing_left(folder_of(args, overrides)):
        return _train(args, configured(args, overrides), overrides)


def _configured(args: argparse.Namespace, overrides: list[str]) -> Config:
    import os

    from vjepa_fast import config

    cfg = config.load(args.config, overrides)
    # a run folder that was moved goes on where it lies now
    folder = args.folder or (args.config if os.path.isdir(args.config) else None)
    return cfg if folder is None else config.load(args.config, [*overrides, folder_override(folder)])


def _train(args: argparse.Namespace, cfg: Config, overrides: list[str]) -> int:
    from vjepa_fast import trainer

    if args.init is not None:
        cfg = dataclasses.replace(cfg, init=dataclasses.replace(cfg.init, path=args.init))
    with blamed(args.config or RECIPE, overrides):
        result = trainer.train(
            cfg,
            resume=not args.no_resume,
            max_steps=args.max_steps,
            profile=args.profile,
            fallback=not args.no_fallback,
            probe=_probe(cfg),
        )
    say(f"step {result.step}: {result.folder}")
    if result.checkpoint is not None:
        say(f"checkpoint: {result.checkpoint}")
    return 0


def _probe(cfg: Config) -> MakeProbe | None:
    """What ``monitor.probe`` needs: the trainer does not know evaluation."""
    if cfg.monitor.probe is None:
        return None
    from vjepa_fast.evaluation import quick_probe

    return quick_probe
