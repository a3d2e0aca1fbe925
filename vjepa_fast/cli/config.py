"""``vjepa-fast config``: list recipes and what can be named in them, print one resolved, or check that it can run."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from vjepa_fast.cli._arguments import add_overrides

if TYPE_CHECKING:
    from torch import nn

HELP = "list the recipes, print one with all its values, or check a file"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """``show`` and ``check`` with a configuration, ``list`` without."""
    actions = parser.add_subparsers(dest="action", metavar="ACTION", required=True, parser_class=type(parser))
    show = actions.add_parser("show", help="print the resolved configuration as YAML")
    checked = actions.add_parser("check", help="refuse what train would refuse before its first batch")
    for action in (show, checked):
        action.add_argument("config", help="YAML file (ours or published), recipe name or run folder")
        add_overrides(action)
    listed = actions.add_parser(
        "list", help="print the recipes, and the objectives, mask strategies, ... to name in one"
    )
    listed.add_argument("--recipes", action="store_true", help="only the names of the recipes; needs no torch")


def run(args: argparse.Namespace) -> int:
    """Carry out one action."""
    from vjepa_fast import config
    from vjepa_fast.config.convert import named

    if args.action == "list":
        print("\n".join(config.list_recipes()))
        if not args.recipes:
            _list_kinds()
        return 0
    cfg = config.load(args.config, args.overrides)
    from vjepa_fast import trainer

    with named(args.config):
        checked = trainer.check(cfg)
    if args.action == "show":
        print(config.dump_yaml(cfg), end="")
        return 0
    sizes = {"encoder": checked.encoder, "predictor": checked.predictor, "heads": checked.plan.heads}
    counts = ", ".join(f"{name} {_millions(module)}" for name, module in sizes.items())
    print(f"{args.config}: usable; parameters: {counts}; objectives: {', '.join(cfg.objectives)}")
    for text in trainer.check_data(cfg):
        print(f"note: {text}")
    return 0


def _list_kinds() -> None:
    from vjepa_fast.registry import KINDS, registry_of

    print()
    for kind in KINDS:
        print(f"{kind}: {', '.join(sorted(registry_of(kind)))}")


def _millions(module: nn.Module) -> str:
    return f"{sum(p.numel() for p in module.parameters()) / 1e6:.1f} M"
