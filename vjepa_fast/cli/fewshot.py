"""``vjepa-fast fewshot``: N-way K-shot recognition, frozen or fine-tuned, beside random init, with what has leaked."""

from __future__ import annotations

HELP = "few-shot recognition, frozen or fine-tuned, beside random init; says what pretraining has seen"


def add_arguments(parser) -> None:
    from vjepa_fast.cli import _fewshot_tune

    parser.add_argument(
        "checkpoint", metavar="CHECKPOINT_OR_RUN", help="a .pt file, or a run folder (its newest checkpoint)"
    )
    parser.add_argument("--novel", metavar="CSV", required=True, help="manifest of the novel classes")
    parser.add_argument(
        "--base", metavar="CSV", help="manifest of base classes: --method trains on them, --center takes off their mean"
    )
    parser.add_argument(
        "--videos", metavar="DIR", help="--novel, --base and --val are lists (CMN, TRX, HyRSM) of videos below DIR"
    )
    parser.add_argument(
        "--split",
        metavar="NAME[:PART]",
        help="take the classes of a published split from --novel: kinetics100, ssv2_small, ucf101, hmdb51; "
        "part test (default) or val; without --base, the train part is the base",
    )
    parser.add_argument(
        "--pretrain",
        metavar="CSV",
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
    parser.add_argument("--way", type=int, help="classes per episode; these and those below change the protocol")
    parser.add_argument("--shots", type=int, nargs="+", help="labelled clips per class")
    parser.add_argument("--queries", type=int, help="per class and episode")
    parser.add_argument("--episodes", type=int)
    parser.add_argument("--seed", type=int, help="of the episodes (default 0)")
    parser.add_argument("--metric", choices=("cosine", "euclidean"), help="of the prototypes (default cosine)")
    parser.add_argument("--C", type=float, dest="c", help="of the logistic regression, as scikit-learn's (default 1)")
    parser.add_argument(
        "--center",
        nargs="?",
        const="base",
        default="none",
        choices=("none", "base", "shots"),
        help="take off the mean of the base classes (no value given), or of the episode's shots",
    )
    parser.add_argument("--l2", action="store_true", help="divide features by their norm (after centring)")
    parser.add_argument(
        "--which",
        choices=("both", "target_encoder", "encoder"),
        default="both",
        help="EMA target, student, or both (default)",
    )
    parser.add_argument(
        "--pooling", choices=("mean", "time", "meanstd"), default="time", help="as of probe (default %(default)s)"
    )
    parser.add_argument("--level", choices=("last", "all"), default="last", help="last encoder level (default) or all")
    parser.add_argument("--images", choices=("repeat", "single"), default="repeat", help="as of probe (default repeat)")
    parser.add_argument("--num-frames", type=int, help="default: as trained")
    parser.add_argument("--crop-size", type=int, help="pixels; default: as trained")
    parser.add_argument("--frame-step", type=int, help="default: as trained")
    parser.add_argument("--batch-size", type=int, default=16, help="clips at once (default %(default)s)")
    parser.add_argument("--workers", type=int, default=0, help="decoding processes (default %(default)s)")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:N or mps (default %(default)s)")
    parser.add_argument("--config", help="recipe or YAML of a checkpoint that holds no configuration (FAIR weights)")
    parser.add_argument("--no-random", action="store_true", help="leave the random-init control out")
    parser.add_argument("--cache", metavar="DIR", help="folder for features (default: features/ in the run folder)")
    parser.add_argument("--no-cache", action="store_true", help="keep no features")
    parser.add_argument("--json", metavar="PATH", help="also write rows and leakage to a file")
    _fewshot_tune.add_arguments(parser)


def run(args) -> int:
    _check(args)
    from rich.console import Console

    from vjepa_fast import config as configs
    from vjepa_fast.cli._fewshot_tune import settings_of
    from vjepa_fast.cli.probe import _device, print_table
    from vjepa_fast.evaluation.fewshot.protocols import episode_protocol
    from vjepa_fast.evaluation.leakage import find_leakage
    from vjepa_fast.evaluation.run.checkpoint import WHICH, Protocol, cache_folder, checkpoint_config
    from vjepa_fast.evaluation.run.fewshot import (
        check_episodes,
        fewshot_checkpoint,
        pretraining_manifests,
        tune_checkpoint,
    )

    console = Console(stderr=True)
    protocol = episode_protocol(
        args.protocol,
        way=args.way,
        shots=tuple(args.shots) if args.shots else None,
        queries=args.queries,
        episodes=args.episodes,
        seed=args.seed,
    )
    settings = None if args.method == "frozen" else settings_of(args.method, args)
    novel, base, val = _manifests(args)
    check_episodes(novel, protocol)
    given = configs.load(args.config) if args.config else None
    pretrain, gaps = _pretrain(args, pretraining_manifests, given or checkpoint_config(args.checkpoint))
    options = {"center": args.center, "l2": args.l2}
    options |= {"c": args.c or 1.0} if args.classifier == "logistic" else {"metric": args.metric or "cosine"}
    view = Protocol(
        pooling=args.pooling,
        level=args.level,
        batch_size=args.batch_size,
        num_frames=args.num_frames,
        crop_size=args.crop_size,
        frame_step=args.frame_step,
        images=args.images,
        workers=args.workers,
    )
    with console.status("looking for leakage") as status:
        content = not args.no_content
        leaks = {"leakage": find_leakage(novel, pretrain, content=content, gaps=gaps)}
        common = {
            "protocol": protocol,
            "view": view,
            "which": WHICH if args.which == "both" else (args.which,),
            "config": given,
            "random": not args.no_random,
            "device": _device(args.device),
            "cache_dir": None if args.no_cache else args.cache or cache_folder(args.checkpoint),
            "on_progress": status.update,
        }
        tuned = {}
        if args.method == "frozen":
            how = {"base": base, "classifier": args.classifier, "options": options}
            rows = fewshot_checkpoint(args.checkpoint, novel, **how, **common)
        else:
            trained_on = [base] if val is None else [base, val]
            leaks["leakage_of_base"] = find_leakage(novel, trained_on, content=content, labelled=True)
            rows, tuned = tune_checkpoint(
                args.checkpoint, novel, base, val, method=args.method, settings=settings, **common
            )
    print_table(rows, title=f"Few-shot, accuracy in %, {_options_text(args.classifier, options)}")
    print(f"Protocol {protocol.text}.")
    for note in dict.fromkeys(note for result in tuned.values() for note in result.notes):
        print(f"{args.method}: {note}")
    for leak in leaks.values():
        print(leak.statement)
    if args.json:
        _write_json(args, protocol, options, view, leaks, rows, tuned)
    return 0


def _check(args) -> None:
    import os

    from vjepa_fast.cli import _fewshot_tune
    from vjepa_fast.errors import ConfigError, DataError, UserError

    _fewshot_tune.check(args)
    for name in ("num_frames", "crop_size", "frame_step", "batch_size"):
        value = getattr(args, name)
        if value is not None and value < 1:
            raise UserError(f"--{name.replace('_', '-')}: {value} is not a positive number")
    if args.c is not None and args.classifier != "logistic":
        raise ConfigError("--C belongs to --classifier logistic")
    if args.c is not None and not 0 < args.c < float("inf"):
        raise ConfigError(f"--C: {args.c} is not a positive number")
    if args.metric is not None and args.classifier != "prototype":
        raise ConfigError("--metric belongs to --classifier prototype")
    if args.center == "base" and not args.base and not args.split:
        raise ConfigError("--center takes off the mean of the base classes: give --base, or use --center shots")
    if args.videos and args.split:
        raise ConfigError("--videos reads lists, which hold their split already; leave --split out")
    for path in (args.novel, args.base, args.val, *(args.pretrain or ())):
        if path and not os.path.isfile(path):
            raise DataError(f"{path}: no such manifest; `vjepa-fast data manifest DIR` writes one")
    if args.json:
        folder = os.path.dirname(os.path.abspath(args.json))
        if not os.path.isdir(folder) or not os.access(folder, os.W_OK) or os.path.isdir(args.json):
            raise UserError(f"{args.json}: cannot be written; choose a file in a folder that exists and is writable")


def _manifests(args):
    """Manifests of the novel, the base and the validation classes (the last two or None)."""
    from vjepa_fast.data import load_manifest
    from vjepa_fast.evaluation.fewshot.splits import manifest_from_list, select_part

    if args.videos:
        lists = args.novel, args.base, args.val
        return tuple(manifest_from_list(path, args.videos)[0] if path else None for path in lists)
    novel = load_manifest(args.novel)
    base, val = (load_manifest(path) if path else None for path in (args.base, args.val))
    if args.split:
        name, _, part = args.split.partition(":")
        tuned, part = args.method != "frozen", part or "test"
        if val is None and base is None and tuned and part != "val":
            val = select_part(novel, name, "val")
        if base is None and (tuned or args.center == "base"):
            base = select_part(novel, name, "train")
        novel = select_part(novel, name, part)
    return novel, base, val


def _pretrain(args, of_config, config):
    from vjepa_fast.data import load_manifest

    if args.pretrain:
        return [load_manifest(path) for path in args.pretrain], []
    return of_config(config)


def _options_text(classifier: str, options: dict) -> str:
    text = [f"{classifier} ({options['metric']})" if "metric" in options else f"{classifier} (C = {options['c']:g})"]
    text += [f"less the mean of the {options['center']}"] if options["center"] != "none" else []
    return ", ".join(text + (["L2-normalised"] if options["l2"] else []))


def _write_json(args, protocol, options, view, leaks, rows, tuned) -> None:
    import json
    import os
    from dataclasses import asdict

    taken = ("pooling", "level", "num_frames", "crop_size", "frame_step", "images")
    content = {
        "checkpoint": os.path.abspath(args.checkpoint),
        "protocol": asdict(protocol),
        "method": args.method,
        "classifier": {"name": args.classifier, **options},
        "features": {k: getattr(view, k) for k in taken},
        "manifests": {k: getattr(args, k) for k in ("novel", "base", "val", "pretrain", "videos", "split")},
        **{k: leak.to_dict() for k, leak in leaks.items()},
        "rows": [r.to_dict() for r in rows],
        "tuning": {label: result.to_dict() for label, result in tuned.items()},
    }
    temporary = args.json + ".tmp"
    with open(temporary, "w", encoding="utf-8") as file:
        json.dump(content, file, indent=1)
    os.replace(temporary, args.json)
