"""What terms see of the feature channels: windows and widths of the split in layers/channels.py."""

from __future__ import annotations

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
