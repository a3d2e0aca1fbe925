"""The length of a run in steps, as overrides of the keys that make it up."""

from __future__ import annotations

from vjepa_fast.config.schema import OptimizationConfig


def length(steps: int, optimization: OptimizationConfig) -> list[str]:
    """Overrides that make a run ``steps`` optimiser steps long.

    It has as many epochs as divide the steps, at most those that it had; the warm-up keeps its share of the run.
    """
    o = optimization
    epochs = next(n for n in range(min(o.epochs, steps), 0, -1) if steps % n == 0)
    values = {"epochs": epochs, "ipe": steps // epochs, "warmup": round(o.warmup * epochs / o.epochs, 6)}
    return [f"optimization.{key}={value}" for key, value in values.items()]
