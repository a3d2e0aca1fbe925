"""The split of the feature channels into an appearance and a dynamics part.

``depth`` cuts the concatenation of levels once (the published split: at ratio 0.5 the first half of the levels is
appearance); ``channel`` cuts every level. D = L * E channels; D_app = max(1, int(ratio * width)) of each cut piece.
"""
from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

from .api import TermContext


def appearance_width(ratio: float, width: int) -> int:
    """How many of ``width`` channels are appearance."""
    return max(1, int(width * ratio))


def appearance_window(ratio: float, split: str, ctx: TermContext) -> tuple[int, int, int]:
    """The appearance channels as (low, high, period), see ``ops.latent.RowCall``."""
    period = ctx.embed_dim if split == "channel" else ctx.dim
    return 0, appearance_width(ratio, period), period


def appearance(x: Tensor, ratio: float, split: str, ctx: TermContext) -> Tensor:
    """Appearance channels of ``x`` [..., D]."""
    if split == "channel":
        return x.unflatten(-1, (ctx.levels, ctx.embed_dim))[..., : appearance_width(ratio, ctx.embed_dim)].flatten(-2)
    return x[..., : appearance_width(ratio, ctx.dim)]


def dynamics(x: Tensor, ratio: float, split: str, ctx: TermContext) -> Tensor:
    """The other channels of ``x`` [..., D]."""
    if split == "channel":
        return x.unflatten(-1, (ctx.levels, ctx.embed_dim))[..., appearance_width(ratio, ctx.embed_dim) :].flatten(-2)
    return x[..., appearance_width(ratio, ctx.dim) :]


def head_input(x: Tensor, channels: str, ratio: float, ctx: TermContext) -> Tensor:
    """What a head sees of ``x`` [..., D]: all channels, or the dynamics part of the depth split."""
    return x if channels == "all" else dynamics(x, ratio, "depth", ctx)


def head_width(channels: str, ratio: float, ctx: TermContext) -> int:
    """Width of ``head_input``."""
    return ctx.dim if channels == "all" else ctx.dim - appearance_width(ratio, ctx.dim)


def level_norm(x: Tensor, ctx: TermContext) -> Tensor:
    """Each level of ``x`` [..., D] normalised on its own, without affine parameters."""
    return F.layer_norm(x.unflatten(-1, (ctx.levels, ctx.embed_dim)), (ctx.embed_dim,)).flatten(-2)


def subspaces(x: Tensor, levels: int, split: str = "depth", ratio: float = 0.5) -> dict[tuple[int | str, str], Tensor]:
    """The levels and halves of features ``x`` [..., D] by (level from 0 or "all", "all" | "appearance" | "dynamics").

    Every level, all levels, and both halves of all levels; ``channel`` cuts every level, so its halves are there too.
    """
    ctx = TermContext(levels, x.shape[-1] // levels)
    each = x.unflatten(-1, (levels, ctx.embed_dim)).unbind(-2)
    parts = {(i, "all"): level for i, level in enumerate(each)}
    parts["all", "all"] = x
    parts["all", "appearance"] = appearance(x, ratio, split, ctx)
    parts["all", "dynamics"] = dynamics(x, ratio, split, ctx)
    if split == "channel":
        one = TermContext(1, ctx.embed_dim)
        for i, level in enumerate(each):
            parts[i, "appearance"] = appearance(level, ratio, split, one)
            parts[i, "dynamics"] = dynamics(level, ratio, split, one)
    return parts
