"""The split of the feature channels into an appearance and a dynamics part.

``depth`` cuts the concatenation of levels once (the published split: at ratio 0.5 the first half of the levels is
appearance); ``channel`` cuts every level. D = levels * E channels; D_app = max(1, int(ratio * width)) of each piece.
"""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F


def appearance_width(ratio: float, width: int) -> int:
    """How many of ``width`` channels are appearance."""
    return max(1, int(width * ratio))


def appearance(x: Tensor, ratio: float, split: str, levels: int) -> Tensor:
    """Appearance channels of ``x`` [..., D]."""
    if split == "channel":
        x = x.unflatten(-1, (levels, -1))
        return x[..., : appearance_width(ratio, x.shape[-1])].flatten(-2)
    return x[..., : appearance_width(ratio, x.shape[-1])]


def dynamics(x: Tensor, ratio: float, split: str, levels: int) -> Tensor:
    """The other channels of ``x`` [..., D]."""
    if split == "channel":
        x = x.unflatten(-1, (levels, -1))
        return x[..., appearance_width(ratio, x.shape[-1]) :].flatten(-2)
    return x[..., appearance_width(ratio, x.shape[-1]) :]


def level_norm(x: Tensor, levels: int) -> Tensor:
    """Each level of ``x`` [..., D] normalised on its own, without affine parameters."""
    return F.layer_norm(x.unflatten(-1, (levels, -1)), (x.shape[-1] // levels,)).flatten(-2)


def subspaces(x: Tensor, levels: int, split: str = "depth", ratio: float = 0.5) -> dict[tuple[int | str, str], Tensor]:
    """The levels and halves of features ``x`` [..., D] by (level from 0 or "all", "all" | "appearance" | "dynamics").

    Every level, all levels, and both halves of all levels; ``channel`` cuts every level, so its halves are there too.
    """
    each = x.unflatten(-1, (levels, -1)).unbind(-2)
    parts: dict[tuple[int | str, str], Tensor] = {(i, "all"): level for i, level in enumerate(each)}
    parts["all", "all"] = x
    parts["all", "appearance"] = appearance(x, ratio, split, levels)
    parts["all", "dynamics"] = dynamics(x, ratio, split, levels)
    if split == "channel":
        for i, level in enumerate(each):
            parts[i, "appearance"] = appearance(level, ratio, split, 1)
            parts[i, "dynamics"] = dynamics(level, ratio, split, 1)
    return parts
