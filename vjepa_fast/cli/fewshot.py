"""``vjepa-fast fewshot``: N-way K-shot recognition, frozen or fine-tuned, beside random init, with what has leaked."""

from __future__ import annotations

import json
import os
from argparse import ArgumentParser, Namespace
from dataclasses import asdict, fields
from typing import TYPE_CHECKING

from vjepa_fast.cli import _arguments as arguments
from vjepa_fast.cli import _fewshot_tune
from vjepa_fast.cli._console import say
from vjepa_fast.files import write_text

if TYPE_CHECKING:
    from vjepa_fast.config.schema import Config
    from vjepa_fast.data.manifests.manifest import Manifest

HELP = "few-shot recognition, frozen or fine-tuned, beside random init; reports what pretraining has seen"
_LISTS = ("novel", "base", "val", "pretrain")


def add_arguments(parser: ArgumentParser) -> None:
    """Add the flags."""
    arguments.add_encoders(parser)
    manifest, positive = arguments.manifest_file, arguments.positive
    parser.add_argument("--novel", metavar="CSV", type=manifest, required=True, help="manifest of the novel classes")
    parser.add_argument(
        "--base",
        metavar="CSV",
        type=manifest,
        help="manifest of base classes: --method trains on them, --center takes off their mean",
    )
    parser.add_argument(
        "--videos", metavar="DIR", help="--novel, --base and --val are lists (CMN, TRX, HyRSM) of videos below DIR"
    )
    arguments.add_root(parser)
    parser.add_argument(
        "--split",
        metavar="NAME[:PART]",
        help="take the classes of a published split from --novel: kinetics100, ssv2_small, ucf101, hmdb51; "
        "part test (default) or val; without --base, the train part is the base",
    )
    parser.add_argument(
        "--pretrain",
        metavar="CSV",
        type=manifest,
        nargs="+",
        help="manifests of pretraining, to look for leakage (default: those the checkpoint names, where they are here)",
    )
    parser.add_argument("--no-content", action="store_true", help="do not compare the content of files, only names")
    parser.add_argument(
        "--method",
        choices=("frozen", *_fewshot_tune.METHODS),
        default="frozen",
        help="frozen features (default), or fine-tuning on --base beside them",
    )
    parser.add_argument(
        "--classifier", choices=("prototype", "logistic"), default="prototype", help="default %(default)s"
    )
    parser.add_argument(
        "--protocol",
        choices=("action", "meta_baseline", "sun"),
        default="action",
        help="5-way 1 and 5 shots; action: 1 query, 10000 episodes (default); meta_baseline: 15 queries, 8000 in means "
        "of four, Student's t; sun: 15 queries, 2000",
    )
    parser.add_argument("--way", type=positive, help="classes per episode; these and those below change the protocol")
    parser.add_argument("--shots", type=positive, nargs="+", help="labelled clips per class")
    parser.add_argument("--queries", type=positive, help="per class and episode")
    parser.add_argument("--episodes", type=positive)
    parser.add_argument("--seed", type=arguments.at_least(0), help="of the episodes (default 0)")
    parser.add_argument("--metric", choices=("cosine", "euclidean"), help="of the prototypes (default cosine)")
    parser.add_argument(
        "--C", type=arguments.positive_real, dest="c", help="of the logistic regression, as scikit-learn's (default 1)"
    )
    parser.add_argument(
        "--center",
        nargs="?",
        const="base",
        default="none",
        choices=("none", "base", "shots"),
        help="take off the mean of the base classes (no value given), or of the episode's shots",
    )
    parser.add_argument("--l2", action="store_true", help="divide features by their norm (after centring)")
    arguments.add_features(parser)
    arguments.add_readout(parser, "last/tdiff/standard/cosine")
    arguments.add_clips(parser)
    arguments.add_device(parser)
    arguments.add_json(parser, "rows and leakage")
    _fewshot_tune.add_arguments(parser)


def run(args: Namespace) -> int:
    """Look for leakage, measure every encoder and print the table."""
    _check(args)
    from rich.console import Console

    from vjepa_fast.cli.probe import print_table
    from vjepa_fast.evaluation.fewshot.leakage import find_leakage
    from vjepa_fast.evaluation.fewshot.protocols import episode_protocol
    from vjepa_fast.evaluation.run.encoders import checkpoint_config
    from vjepa_fast.evaluation.run.fewshot import check_episodes, fewshot_checkpoint, tune_checkpoint
    from vjepa_fast.evaluation.run.readout import readout_checkpoint
    from vjepa_fast.evaluation.run.sources import FeatureSettings

    protocol = episode_protocol(
        args.protocol,
        way=args.way,
        shots=tuple(args.shots) if args.shots else None,
        queries=args.queries,
        episodes=args.episodes,
        seed=args.seed,
    )
    tuning = None if args.method == "frozen" else _fewshot_tune.settings_of(args.method, args)
    novel, base, val = _manifests(args)
    check_episodes(novel, protocol)
    subject = arguments.subject_of(args)
    pretrain, gaps = _pretrain(args, subject["config"] or checkpoint_config(args.checkpoint))
    options = {"center": args.center, "l2": args.l2}
    options |= {"c": args.c or 1.0} if args.classifier == "logistic" else {"metric": args.metric or "cosine"}
    settings = FeatureSettings(
        **{f.name: getattr(args, f.name) for f in fields(FeatureSettings) if hasattr(args, f.name)}
    )
    with Console(stderr=True).status("looking for leakage") as status:
        content = not args.no_content
        leaks = {"leakage": find_leakage(novel, pretrain, content=content, gaps=gaps)}
        common = {"novel": novel, "protocol": protocol, "settings": settings, "on_progress": status.update, **subject}
        tuned, choices = {}, {}
        if args.readout:
            rows, choices = readout_checkpoint(base=base, val=val, readout=args.readout, **common)
            if read := [m for m in (base, val) if m is not None]:
                leaks["leakage_of_base"] = find_leakage(novel, read, content=content, labelled=True)
        elif base is None or args.method == "frozen":  # `_check`: a method that trains has a base
            rows = fewshot_checkpoint(base=base, classifier=args.classifier, options=options, **common)
        else:
            trained_on = [base] if val is None else [base, val]
            leaks["leakage_of_base"] = find_leakage(novel, trained_on, content=content, labelled=True)
            rows, tuned = tune_checkpoint(base=base, val=val, method=args.method, tuning=tuning, **common)
    if args.json:
        taken = (*(() if args.readout else ("pooling", "level")), "num_frames", "crop_size", "frame_step", "images")
        content = {
            "checkpoint": os.path.abspath(args.checkpoint),
            "protocol": asdict(protocol),
            "method": args.method,
            **({} if args.readout else {"classifier": {"name": args.classifier, **options}}),
            "features": {k: getattr(settings, k) for k in taken},
            "manifests": {k: getattr(args, k) for k in (*_LISTS, "videos", "split", "root")},
            **{k: leak.to_dict() for k, leak in leaks.items()},
            "rows": [r.to_dict() for r in rows],
            **({"readout": {label: choice.to_dict() for label, choice in choices.items()}} if args.readout else {}),
            "tuning": {label: result.to_dict() for label, result in tuned.items()},
        }
        write_text(args.json, json.dumps(content, indent=1))
    how = f"readout {args.readout}" if args.readout else _options_text(args.classifier, options)
    print_table(rows, title=f"Few-shot, accuracy in %, {how}")
    for label, choice in choices.items():
        say(f"{label}: {choice.text}")
    for note in dict.fromkeys(note for choice in choices.values() for note in choice.notes):
        say(f"readout: {note}")
    say(f"Protocol {protocol.text}.")
    for note in dict.fromkeys(note for result in tuned.values() for note in result.notes):
        say(f"{args.method}: {note}")
    for leak in leaks.values():
        say(*leak.statement.split("\n"))
    return 0


def _check(args: Namespace) -> None:
    from vjepa_fast.errors import ConfigError

    _fewshot_tune.check(args)
    if args.c is not None and args.classifier != "logistic":
        raise ConfigError("--C belongs to --classifier logistic")
    if args.metric is not None and args.classifier != "prototype":
        raise ConfigError("--metric belongs to --classifier prototype")
    if args.center == "base" and not args.base and not args.split:
        raise ConfigError("--center takes off the mean of the base classes: give --base, or use --center shots")
    if args.readout and args.method != "frozen":
        raise ConfigError(f"--readout belongs to --method frozen, not {args.method}")
    arguments.check_readout(args, ("--classifier", "prototype"), ("--center", "none"), ("--l2", False))
    if args.readout and args.val and args.readout != "auto":
        raise ConfigError(f"--val chooses a readout; leave it out beside --readout {args.readout}")
    if args.readout and args.metric:
        raise ConfigError("--metric: a readout names its classifier; leave it out")
    if args.videos and args.root:
        raise ConfigError("--root is where the paths of manifests start; the lists are of videos below --videos")
    if args.videos and args.split:
        raise ConfigError("--videos reads lists, which hold their split already; leave --split out")


def _manifests(args: Namespace) -> tuple[Manifest, Manifest | None, Manifest | None]:
    """Manifests of the novel, the base and the validation classes (the last two or None)."""
    from vjepa_fast.data.manifests.manifest import load_manifest
    from vjepa_fast.data.manifests.root import Root
    from vjepa_fast.evaluation.fewshot.splits import manifest_from_list, select_part

    if args.videos:
        base, val = (manifest_from_list(path, args.videos)[0] if path else None for path in (args.base, args.val))
        return manifest_from_list(args.novel, args.videos)[0], base, val
    root = Root.given(args.root)
    novel = load_manifest(args.novel, root)
    base, val = (load_manifest(path, root) if path else None for path in (args.base, args.val))
    if args.split:
        name, _, part = args.split.partition(":")
        tuned, part = args.method != "frozen" or args.readout == "auto", part or "test"
        if val is None and base is None and tuned and part != "val":
            val = select_part(novel, name, "val")
        if base is None and (tuned or args.readout or args.center == "base"):
            base = select_part(novel, name, "train")
        novel = select_part(novel, name, part)
    return novel, base, val


def _pretrain(args: Namespace, config: Config | None) -> tuple[list[Manifest], list[str]]:
    """(manifests of pretraining, what is not known of them)."""
    from vjepa_fast.data.manifests.manifest import load_manifest
    from vjepa_fast.evaluation.run.fewshot import pretraining_manifests

    if args.pretrain:
        return [load_manifest(path) for path in args.pretrain], []  # of another place than --root
    return pretraining_manifests(config)


def _options_text(classifier: str, options: dict) -> str:
    text = [f"{classifier} ({options['metric']})" if "metric" in options else f"{classifier} (C = {options['c']:g})"]
    text += [f"less the mean of the {options['center']}"] if options["center"] != "none" else []
    return ", ".join(text + (["L2-normalised"] if options["l2"] else []))
