"""Arguments of the few-shot methods that train, for ``vjepa-fast fewshot``, and the settings that they make."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from typing import TYPE_CHECKING, Any

from vjepa_fast.cli import _arguments as arguments

if TYPE_CHECKING:
    from vjepa_fast.evaluation.fewshot.tuning.settings import FitSettings, TuneSettings

METHODS = ("meta-baseline", "sun")
SHARED = (
    "val",
    "trunk",
    "tune_epochs",
    "tune_lr",
    "tune_batch",
    "tune_chunk",
    "meta_epochs",
    "meta_steps",
    "meta_lr",
    "meta_way",
    "meta_shot",
    "meta_queries",
    "val_way",
    "val_queries",
)
SUN = ("flip", "top_k", "background")


def check(args: Namespace) -> None:
    """ConfigError for arguments that ``args.method`` does not read, and for base classes that it lacks."""
    from vjepa_fast.errors import ConfigError

    names, methods = (SHARED + SUN, METHODS) if args.method == "frozen" else (SUN, ("sun",))
    if args.method != "sun" and (given := [n for n in names if getattr(args, n) is not None]):
        raise ConfigError(f"--{given[0].replace('_', '-')} belongs to --method {' or '.join(methods)}")
    if args.method == "frozen":
        return
    if args.classifier != "prototype" or args.metric == "euclidean" or args.center != "none" or args.l2:
        raise ConfigError(
            f"--method {args.method} is tested by cosine prototypes; --classifier, --metric, --center and --l2 belong "
            "to --method frozen"
        )
    if args.images != "repeat":
        raise ConfigError("--images single belongs to --method frozen")
    if not args.base and not args.split:
        raise ConfigError(f"--method {args.method} trains on base classes: give --base, or --split")


def add_arguments(parser: ArgumentParser) -> None:
    """Add the group; what is left out has the value of the method's paper."""
    group = parser.add_argument_group("methods that train (meta-baseline, sun); default: as in the papers")
    group.add_argument(
        "--val",
        metavar="CSV",
        type=arguments.manifest_file,
        help="validation classes, which choose the epoch (default: some of --base; with --split alone, its val part)",
    )
    group.add_argument(
        "--trunk", metavar="all|head|N", help="what is trained: encoder (default), a projection, N last blocks"
    )
    group.add_argument("--tune-epochs", type=int, metavar="N", help="of the classifier; of sun's teacher and student")
    group.add_argument("--tune-lr", type=float, metavar="X", help="of the classifier; of sun's teacher and student")
    group.add_argument("--tune-batch", type=int, metavar="N", help="of the classifier; of sun's teacher and student")
    group.add_argument("--tune-chunk", type=int, metavar="N", help="clips through the encoder at once (default 64)")
    group.add_argument("--meta-epochs", type=int, metavar="N")
    group.add_argument("--meta-steps", type=int, metavar="N", help="per epoch")
    group.add_argument("--meta-lr", type=float, metavar="X")
    group.add_argument("--meta-way", type=int, metavar="N")
    group.add_argument("--meta-shot", type=int, metavar="N")
    group.add_argument("--meta-queries", type=int, metavar="N")
    group.add_argument("--val-way", type=int, metavar="N", help="of the episodes that choose the epoch (default 5)")
    group.add_argument("--val-queries", type=int, metavar="N", help="likewise, per class (default 15)")
    group.add_argument("--flip", type=float, metavar="P", help="sun: chance of mirroring; 0 where direction matters")
    group.add_argument("--top-k", type=int, metavar="N", help="sun: classes raised in a tubelet's label")
    group.add_argument("--background", type=int, metavar="N", help="sun: tubelets of a clip labelled background")


def settings_of(method: str, args: Namespace, **test: Any) -> TuneSettings:
    """The settings of ``method`` from parsed ``args``. ``test``: further fields of ``TuneSettings``, such as ``way``,
    ``shots``, ``queries``, ``episodes``, ``pooling``. Raises ConfigError for values that cannot be used.
    """
    from dataclasses import replace

    from vjepa_fast.evaluation.fewshot.tuning.methods import method_named

    default: Any = method_named(method)[1]()
    meta = _given(
        args,
        epochs="meta_epochs",
        steps="meta_steps",
        lr="meta_lr",
        way="meta_way",
        shot="meta_shot",
        queries="meta_queries",
        val_way="val_way",
        val_queries="val_queries",
    )
    if "way" in meta:
        meta["reduce_way"] = False  # asked for by name: refused rather than reduced
    fit = _given(args, epochs="tune_epochs", lr="tune_lr", batch_size="tune_batch")
    given = _given(args, trunk="trunk", chunk="tune_chunk")
    fields = {"meta": replace(default.meta, **meta), **given, **test}
    for stage in ("teacher", "student") if method == "sun" else ("classifier",):
        fields[stage] = _scaled(getattr(default, stage), fit)
    if method == "sun":
        fields |= _given(args, top_k="top_k", background="background")
        if args.flip is not None:
            fields["augment"] = replace(default.augment, flip=args.flip)
    return replace(default, **fields)


def _given(args: Namespace, **names: str) -> dict:
    """{field: value} of the arguments that were given."""
    return {field: getattr(args, name) for field, name in names.items() if getattr(args, name) is not None}


def _scaled(default: FitSettings, given: dict) -> FitSettings:
    """With another number of epochs, warm-up and milestones keep their share of the run."""
    from dataclasses import replace

    share = given.get("epochs", default.epochs) / default.epochs
    milestones = tuple(round(m * share) for m in default.milestones)
    return replace(default, warmup=default.warmup * share, milestones=milestones, **given)
