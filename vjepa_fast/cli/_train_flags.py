"""Short flags of ``vjepa-fast train`` for what is changed most: each stands for ``--set`` of a key or two."""

from __future__ import annotations

import argparse

from vjepa_fast.cli._arguments import positive, positive_real


def add_short_flags(parser: argparse.ArgumentParser) -> None:
    """Declare ``--epochs --steps --batch-size --lr``."""
    parser.add_argument("--epochs", type=positive, metavar="N", help="short for --set optimization.epochs=N")
    parser.add_argument(
        "--steps",
        type=positive,
        metavar="N",
        help="optimiser steps in all, schedules included: sets optimization.epochs, ipe, and warmup to the same share",
    )
    parser.add_argument("--batch-size", type=positive, metavar="N", help="short for --set data.batch_size=N")
    parser.add_argument(
        "--lr", type=positive_real, metavar="X", help="optimization.lr; start_lr and final_lr change by the same factor"
    )


def short_overrides(args: argparse.Namespace) -> list[str]:
    """What the short flags stand for, but for those that need the recipe's own values (`scaled`)."""
    from vjepa_fast.config import Given

    given = {"--epochs": ("optimization.epochs", args.epochs), "--batch-size": ("data.batch_size", args.batch_size)}
    return [Given(f"{key}={value}", f"{flag} {value}") for flag, (key, value) in given.items() if value is not None]


def scaled(args: argparse.Namespace, recipe: str | None, overrides: list[str]) -> list[str]:
    """Overrides for ``--lr`` and ``--steps``, by what ``recipe`` with ``overrides`` holds."""
    from vjepa_fast import config
    from vjepa_fast.config import Given
    from vjepa_fast.config.length import length

    if args.lr is None and args.steps is None:
        return []
    found, values = config.load(recipe, overrides).optimization, dict[str, object]()
    if args.lr is not None and found.lr:
        start, final = (round(x * args.lr / found.lr, 12) for x in (found.start_lr, found.final_lr))
        values = {"lr": args.lr, "start_lr": start, "final_lr": final}
    rates = [Given(f"optimization.{key}={value}", f"--lr {args.lr:g}") for key, value in values.items()]
    steps = [] if args.steps is None else length(args.steps, found)
    return [*rates, *(Given(text, f"--steps {args.steps}") for text in steps)]
