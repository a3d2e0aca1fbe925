"""What terms see of the feature channels: windows and widths of the split in layers/channels.py."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from vjepa_fast.layers.channels import appearance_width, dynamics
from vjepa_fast.objectives.api import TermContext


def appearance_window(ratio: float, split: str, ctx: TermContext) -> tuple[int, int, int]:
    """The appearance channels as (low, high, period), see ``ops.latent.RowCall``."""
    period = ctx.embed_dim if split == "channel" else ctx.dim
    return 0, appearance_width(ratio, period), period


def head_input(x: Tensor, channels: str, ratio: float, ctx: TermContext) -> Tensor:
    """What a head sees of ``x`` [..., D]: all channels, or the dynamics part of the depth split."""
    return x if channels == "all" else dynamics(x, ratio, "depth", ctx.levels)


def head_width(channels: str, ratio: float, ctx: TermContext) -> int:
    """Width of ``head_input``."""
    return ctx.dim if channels == "all" else ctx.dim - appearance_width(ratio, ctx.dim)


def published_channels(values: dict[str, Any], file: Mapping[str, Any]) -> dict[str, Any]:
    """``values`` of a published file for a term with a head: it sees the dynamics part where a term of the factorised
    world model is on, and else has no use for ``app_ratio``.
    """
    if any(file.get(f"optimization.fwm_{part}_coeff", 0) > 0 for part in ("static", "orth")):
        return {**values, "channels": "dynamics"}
    return {k: v for k, v in values.items() if k != "app_ratio"}
