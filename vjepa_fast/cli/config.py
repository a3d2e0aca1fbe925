"""``vjepa-fast config``: list recipes and what can be named in them, print one resolved, or check that it can run."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from vjepa_fast.cli._arguments import add_overrides
from vjepa_fast.cli._console import say

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
        "list", help="print the recipes, a line each, and the objectives, mask strategies, ... to name in one"
    )
    listed.add_argument("--recipes", action="store_true", help="only the names of the recipes; needs no torch")


def run(args: argparse.Namespace) -> int:
    """Carry out one action."""
    from vjepa_fast import config
    from vjepa_fast.config.given import blamed

    if args.action == "list":
        _list(args.recipes)
        return 0
    cfg = config.load(args.config, args.overrides)
    from vjepa_fast import trainer

    with blamed(args.config, args.overrides):
        checked = trainer.check(cfg)
    if args.action == "show":
        say(*config.dump_yaml(cfg).rstrip("\n").split("\n"))
        return 0
    sizes = {"encoder": checked.encoder, "predictor": checked.predictor, "heads": checked.heads}
    counts = ", ".join(f"{name} {_millions(module)}" for name, module in sizes.items() if module is not None)
    loss = f"objectives: {', '.join(cfg.objectives)}" if cfg.method == "vjepa" else f"method: {cfg.method}"
    say(f"{args.config}: usable; parameters: {counts}; {loss}")
    for text in trainer.check_data(cfg):
        say(f"note: {text}")
    return 0


def _list(names_only: bool) -> None:
    from vjepa_fast.config.load import list_recipes
    from vjepa_fast.config.recipes import all_recipes
    from vjepa_fast.registry import KINDS, registry_of

    if names_only:
        say(*list_recipes())
        return
    found = all_recipes()
    width = max(len(recipe.name) for recipe in found)
    for recipe in found:
        own = f" (own data: {recipe.own})" if recipe.own else ""
        say(f"{'*' if recipe.own else ' '} {recipe.name:<{width}}  {recipe.what}{own}")
    say(f"* {'':<{width}}  suits own data, by --videos DIR or --set data.datasets=[MANIFEST]", "")
    for kind in KINDS:
        say(f"{kind}: {', '.join(sorted(registry_of(kind)))}")


def _millions(module: nn.Module) -> str:
    return f"{sum(p.numel() for p in module.parameters()) / 1e6:.1f} M"
