"""``vjepa-fast config``: list recipes, print one resolved, or check that it can be built."""

from __future__ import annotations

HELP = "list the recipes, print one with all its values, or check a file"


def add_arguments(parser) -> None:
    actions = parser.add_subparsers(dest="action", metavar="ACTION", required=True, parser_class=type(parser))
    show = actions.add_parser("show", help="print the resolved configuration as YAML")
    checked = actions.add_parser("check", help="check values, objectives and models (built without memory)")
    for action in (show, checked):
        action.add_argument("config", help="YAML file (ours or published), recipe name or run folder")
        action.add_argument(
            "--set",
            dest="overrides",
            action="append",
            default=[],
            metavar="KEY=VALUE",
            help="override one value, such as optimization.lr=3e-4; may be repeated",
        )
    actions.add_parser("list", help="print the names of the recipes")


def run(args) -> int:
    from vjepa_fast import config
    from vjepa_fast.errors import ConfigError

    if args.action == "list":
        for name in config.list_recipes():
            print(name)
        return 0
    cfg = config.load(args.config, args.overrides)
    try:
        if args.action == "show":
            _build_objectives(cfg, 32)  # refuses unknown terms and fields; the width does not matter
            print(config.dump_yaml(cfg), end="")
            return 0
        encoder, predictor, plan = build(cfg)
    except ConfigError as error:  # the packages below know the key, not the file
        raise ConfigError(f"{args.config}: {error}") from None
    sizes = {"encoder": encoder, "predictor": predictor, "heads": plan.heads}
    counts = ", ".join(f"{name} {_millions(module)}" for name, module in sizes.items())
    print(f"{args.config}: usable; parameters: {counts}; objectives: {', '.join(cfg.objectives)}")
    return 0


def build(cfg):
    """``(encoder, predictor, plan)`` of a configuration on torch's meta device: shapes without memory."""
    import torch

    from vjepa_fast import models

    with torch.device("meta"):
        encoder, predictor = models.build_from_config(cfg)
        return encoder, predictor, _build_objectives(cfg, encoder.embed_dim)


def _build_objectives(cfg, embed_dim: int):
    from vjepa_fast import objectives

    target = cfg.target
    return objectives.build_objectives(
        cfg.objectives,
        levels=cfg.model.levels,
        embed_dim=embed_dim,
        compat=cfg.compat,
        target_grad=target.mode == "online",
        stop_gradient=target.stop_gradient,
        seed=cfg.seed,
    )


def _millions(module) -> str:
    return f"{sum(p.numel() for p in module.parameters()) / 1e6:.1f} M"
