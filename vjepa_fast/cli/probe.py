"""``vjepa-fast probe``: what a frozen encoder knows, beside the same network with random weights."""

from __future__ import annotations

HELP = "frozen evaluation: linear, kNN and attentive probes, few-shot episodes, beside random init"

PROBES = {
    "linear": ("linear",),
    "knn": ("knn",),
    "attentive": ("attentive",),
    "both": ("linear", "knn"),
    "all": ("linear", "knn", "attentive"),
}
VIEWS = ("clips", "crops", "epochs", "probe_batch")


def add_arguments(parser) -> None:
    parser.add_argument(
        "checkpoint", metavar="CHECKPOINT_OR_RUN", help="a .pt file, or a run folder (its newest checkpoint)"
    )
    parser.add_argument("--train", metavar="CSV", help="manifest the probe is fitted on")
    parser.add_argument("--val", metavar="CSV", help="manifest that chooses penalty and k (default: 20 %% of --train)")
    parser.add_argument("--test", metavar="CSV", help="manifest the accuracy is measured on")
    parser.add_argument("--fewshot", metavar="CSV", help="manifest of novel classes for few-shot episodes")
    parser.add_argument(
        "--which",
        choices=("both", "target_encoder", "encoder"),
        default="both",
        help="EMA target, student, or both (default)",
    )
    parser.add_argument(
        "--probe",
        choices=tuple(PROBES),
        default="both",
        help="both: linear and knn (default); all: attentive as well",
    )
    parser.add_argument(
        "--task",
        metavar="NAME",
        help="frames, views and epochs of a task, and the classes there must be: diving48, ssv2, k400, imagenet100, "
        "ucf101, motion8, dive, order, objects",
    )
    parser.add_argument(
        "--protocol",
        choices=("vjepa_fast", "published"),
        default="vjepa_fast",
        help="published: the probe behind the published accuracies, for comparison (default %(default)s)",
    )
    parser.add_argument("--clips", type=int, help="clips per video of the attentive probe; default: the task's, or 1")
    parser.add_argument("--crops", type=int, help="crops per clip of the attentive probe; default: the task's, or 1")
    parser.add_argument("--epochs", type=int, help="of the attentive or published probe; default: the task's, or 20")
    parser.add_argument("--probe-batch", type=int, default=64, help="samples per step of it (default %(default)s)")
    parser.add_argument(
        "--storage",
        choices=("bfloat16", "float16", "float32"),
        default="bfloat16",
        help="of the attentive probe's tokens in the cache (default %(default)s)",
    )
    parser.add_argument(
        "--pooling",
        choices=("mean", "time", "meanstd"),
        default="time",
        help="over all tokens; over space with time steps side by side (default); mean and std",
    )
    parser.add_argument("--level", choices=("last", "all"), default="last", help="last encoder level (default) or all")
    parser.add_argument(
        "--images",
        choices=("repeat", "single"),
        default="repeat",
        help="still images as standing clips (default) or through the image embedding",
    )
    parser.add_argument("--num-frames", type=int, help="default: as trained")
    parser.add_argument("--crop-size", type=int, help="pixels; default: as trained")
    parser.add_argument("--frame-step", type=int, help="default: as trained")
    parser.add_argument("--way", type=int, default=5, help="classes per episode (default %(default)s)")
    parser.add_argument("--shots", type=int, nargs="+", default=[1, 5], help="default 1 5")
    parser.add_argument("--queries", type=int, default=15, help="queries per class and episode (default %(default)s)")
    parser.add_argument("--episodes", type=int, default=1000, help="default %(default)s")
    parser.add_argument("--batch-size", type=int, default=16, help="clips at once (default %(default)s)")
    parser.add_argument("--workers", type=int, default=0, help="decoding processes (default %(default)s)")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:N or mps (default %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of held-out parts and episodes (default %(default)s)")
    parser.add_argument("--config", help="recipe or YAML of a checkpoint that holds no configuration (FAIR weights)")
    parser.add_argument("--no-random", action="store_true", help="leave the random-init control out")
    parser.add_argument("--cache", metavar="DIR", help="folder for features (default: features/ in the run folder)")
    parser.add_argument("--no-cache", action="store_true", help="keep no features")
    parser.add_argument("--json", metavar="PATH", help="also write the rows to a file")


def run(args) -> int:
    _check(args)
    from rich.console import Console

    from vjepa_fast import config as configs
    from vjepa_fast.evaluation.run.checkpoint import WHICH, Protocol, cache_folder, probe_checkpoint

    console = Console(stderr=True)
    protocol = Protocol(
        pooling=args.pooling,
        level=args.level,
        probes=PROBES[args.probe],
        batch_size=args.batch_size,
        num_frames=args.num_frames,
        crop_size=args.crop_size,
        frame_step=args.frame_step,
        images=args.images,
        way=args.way,
        shots=tuple(args.shots),
        queries=args.queries,
        episodes=args.episodes,
        seed=args.seed,
        workers=args.workers,
        name=args.protocol,
        task=args.task,
        clips=args.clips,
        crops=args.crops,
        epochs=args.epochs,
        probe_batch=args.probe_batch,
        storage=args.storage,
    ).settled()
    with console.status("reading") as status:
        rows = probe_checkpoint(
            args.checkpoint,
            train=args.train,
            val=args.val,
            test=args.test,
            fewshot=args.fewshot,
            which=WHICH if args.which == "both" else (args.which,),
            protocol=protocol,
            config=configs.load(args.config) if args.config else None,
            random=not args.no_random,
            device=_device(args.device),
            cache_dir=None if args.no_cache else args.cache or cache_folder(args.checkpoint),
            on_progress=status.update,
        )
    print_table(rows)
    leakage = _leakage(args) if args.fewshot else None
    if leakage:
        print(leakage.statement)
    if args.json:
        _write_json(args, protocol, rows, leakage)
    return 0


def _leakage(args):
    """What pretraining has seen of the novel classes, by the data sets that the checkpoint's configuration names."""
    from vjepa_fast import config as configs
    from vjepa_fast import data
    from vjepa_fast.evaluation.leakage import find_leakage
    from vjepa_fast.evaluation.run.checkpoint import checkpoint_config
    from vjepa_fast.evaluation.run.fewshot import pretraining_manifests

    found = configs.load(args.config) if args.config else checkpoint_config(args.checkpoint)
    pretrain, gaps = pretraining_manifests(found)
    return find_leakage(data.load_manifest(args.fewshot), pretrain, gaps=gaps)


def _check(args) -> None:
    import os

    from vjepa_fast.errors import DataError, UserError

    if args.protocol == "published" and args.train is None:
        raise UserError("--protocol published probes: give --train and --test manifests")
    if (args.train is None) != (args.test is None):
        raise UserError("--train and --test go together: one fits the probe, the other measures it")
    if args.train is None and args.fewshot is None:
        raise UserError("nothing to measure: give --train and --test manifests, or --fewshot")
    for name in ("num_frames", "crop_size", "frame_step", "batch_size", "way", "queries", "episodes", *VIEWS):
        value = getattr(args, name)
        if value is not None and value < 1:
            raise UserError(f"--{name.replace('_', '-')}: {value} is not a positive number")
    for path in (args.train, args.val, args.test, args.fewshot):
        if path and not os.path.isfile(path):
            raise DataError(f"{path}: no such manifest; `vjepa-fast data manifest DIR` writes one")
    if args.json:
        folder = os.path.dirname(os.path.abspath(args.json))
        if not os.path.isdir(folder) or not os.access(folder, os.W_OK) or os.path.isdir(args.json):
            raise UserError(f"{args.json}: cannot be written; choose a file in a folder that exists and is writable")


def _device(name: str):
    import torch

    from vjepa_fast.errors import UserError

    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"--device {name}: cannot be used here ({str(error).splitlines()[0]})") from None
    return device


def print_table(rows, title: str = "Frozen evaluation, accuracy in %") -> None:
    """Rows as a table on stdout, with the difference from random init and its 95 % interval."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title=title)
    for name, justify in (
        ("encoder", "left"),
        ("suite", "left"),
        ("probe", "left"),
        ("accuracy", "right"),
        ("95 % interval", "right"),
        ("n", "right"),
        ("against random", "right"),
        ("", "left"),
    ):
        table.add_column(name, justify=justify, no_wrap=name != "encoder")
    marks = {"above": "[green]above", "below": "[red]below", "level": "level", "": ""}
    for i, r in enumerate(rows):
        d = r.difference
        gap = f"{100 * d['value']:+.1f} ({100 * d['low']:+.1f} to {100 * d['high']:+.1f})" if d else ""
        table.add_row(
            r.label,
            r.suite,
            r.probe,
            f"{100 * r.accuracy:.1f}",
            f"{100 * r.low:.1f} to {100 * r.high:.1f}",
            str(r.n),
            gap,
            marks[r.verdict],
            end_section=i + 1 < len(rows) and rows[i + 1].label != r.label,
        )
    # a pipe has no width: give it one that wraps nothing
    console = Console()
    console = console if console.is_terminal else Console(width=140)
    console.print(table)
    for line in notes(rows):
        console.print(line, highlight=False)


def notes(rows) -> list[str]:
    """What stands beside the table: the published way of scoring an attentive probe, which chose nothing here."""
    lines = []
    for r in rows:
        if (most := r.chosen.get("max_over_heads_on_test")) is not None:
            lines.append(
                f"{r.label}, {r.suite}, {r.probe}: max over {r.chosen['heads']} heads on the test set {100 * most:.1f} "
                f"(the published way of scoring; chosen on validation: {100 * r.accuracy:.1f})"
            )
    if any(r.probe == "published" for r in rows):
        lines.append("published: nothing held out, nothing chosen; what is assumed of it is in docs/evaluation.md")
    return lines


def _write_json(args, protocol, rows, leakage=None) -> None:
    import json
    import os
    from dataclasses import asdict

    content = {
        "checkpoint": os.path.abspath(args.checkpoint),
        "protocol": asdict(protocol),
        "manifests": {k: getattr(args, k) for k in ("train", "val", "test", "fewshot")},
        "rows": [r.to_dict() for r in rows],
        "leakage": leakage.to_dict() if leakage else None,
    }
    temporary = args.json + ".tmp"
    with open(temporary, "w", encoding="utf-8") as file:
        json.dump(content, file, indent=1)
    os.replace(temporary, args.json)
