"""Arguments of the few-shot methods that train, for ``vjepa-fast fewshot``, and the settings that they make."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from typing import TYPE_CHECKING, Any

from vjepa_fast.cli import _arguments as arguments

if TYPE_CHECKING:
    from vjepa_fast.evaluation.fewshot.tuning.settings import FitSettings, TuneSettings

SUN = ("sun", "sun-d")
METHODS = ("meta-baseline", *SUN)
ALL_STAGES = "of the classifier; of sun's teacher and student"
NUMBERS = {  # of both methods: type and help
    "tune_epochs": (int, ALL_STAGES),
    "tune_lr": (float, ALL_STAGES),
    "tune_batch": (int, ALL_STAGES),
    "tune_chunk": (int, "clips through the encoder at once (default 64)"),
    "meta_epochs": (int, None),
    "meta_steps": (int, "per epoch"),
    "meta_lr": (float, None),
    "meta_way": (int, None),
    "meta_shot": (int, None),
    "meta_queries": (int, None),
    "val_way": (int, "of the episodes that choose the epoch (default 5)"),
    "val_queries": (int, "likewise, per class (default 15)"),
}
OF_SUN = {
    "flip": (float, "sun: chance of mirroring; 0 where direction matters"),
    "top_k": (int, "sun: classes raised in a tubelet's label"),
    "background": (int, "sun: tubelets of a clip labelled background"),
}
EVERY = ("val", "trunk", *NUMBERS, *OF_SUN)


def check(args: Namespace) -> None:
    """ConfigError for arguments that ``args.method`` does not read, and for base classes that it lacks."""
    from vjepa_fast.errors import ConfigError

    names, methods = (EVERY, METHODS) if args.method == "frozen" else (OF_SUN, SUN)
    if args.readout:
        names = [name for name in names if name != "val"]
    if args.method not in SUN and (given := [n for n in names if getattr(args, n) is not None]):
        raise ConfigError(f"{_flag(given[0])} belongs to --method {' or '.join(methods)}")
    if args.method == "frozen":
        return
    if args.classifier != "prototype" or args.metric == "euclidean" or args.center != "none" or args.l2:
        how = "transport between parts of clips" if args.method == "sun-d" else "cosine prototypes"
        raise ConfigError(
            f"--method {args.method} is tested by {how}; --classifier, --metric, --center and --l2 belong to --method "
            "frozen"
        )
    if args.images != "repeat":
        raise ConfigError("--images single belongs to --method frozen")
    if not args.base and not args.split:
        raise ConfigError(f"--method {args.method} trains on base classes: give --base, or --split")


def add_arguments(parser: ArgumentParser) -> None:
    """Add the group; what is left out has the value of the method's paper."""
    group = parser.add_argument_group("methods that train (meta-baseline, sun, sun-d); default: as in the papers")
    group.add_argument(
        "--val",
        metavar="CSV",
        type=arguments.manifest_file,
        help="validation classes, which choose the epoch (default: some of --base; with --split alone, its val part), "
        "or the readout (--readout auto)",
    )
    group.add_argument(
        "--trunk", metavar="all|head|N", help="what is trained: encoder (default), a projection, N last blocks"
    )
    for name, (kind, text) in (NUMBERS | OF_SUN).items():
        group.add_argument(_flag(name), type=kind, metavar="N" if kind is int else "X", help=text)


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def settings_of(method: str, args: Namespace, **test: Any) -> TuneSettings:
    """The settings of ``method`` from parsed ``args``. ``test``: further fields of ``TuneSettings``, such as ``way``,
    ``shots``, ``queries``, ``episodes``, ``pooling``. Raises ConfigError for values that cannot be used.
    """
    from dataclasses import replace

    from vjepa_fast.evaluation.fewshot.tuning.methods import method_named

    default: Any = method_named(method)[1]()
    meta = _given(args, **{n.removeprefix("meta_"): n for n in NUMBERS if n.startswith(("meta_", "val_"))})
    if "way" in meta:
        meta["reduce_way"] = False  # asked for by name: refused rather than reduced
    fit = _given(args, epochs="tune_epochs", lr="tune_lr", batch_size="tune_batch")
    fields = {"meta": replace(default.meta, **meta), **_given(args, trunk="trunk", chunk="tune_chunk"), **test}
    for stage in ("teacher", "student") if method in SUN else ("classifier",):
        fields[stage] = _scaled(getattr(default, stage), fit)
    if method in SUN:
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
