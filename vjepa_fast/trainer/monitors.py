"""Signs of representation collapse, cheap enough to look at during training.

Rows are tokens, features of one level. Shapes: B batch, N tokens, K kept tokens, D = levels * E.
"""
from __future__ import annotations

import torch

from vjepa_fast.ops import geometry, target_norm

MAX_ROWS = 1024


def _rows(x_BND: torch.Tensor, width: int) -> torch.Tensor:
    """At most ``MAX_ROWS`` evenly spaced tokens, last ``width`` channels, float32 ``[n, width]``."""
    x = x_BND.detach().flatten(0, 1)
    stride = -(-x.shape[0] // MAX_ROWS)
    return x[::stride, -width:].float()


@torch.no_grad()
def collapse(
    h_BND: torch.Tensor, z_BKD: torch.Tensor, levels: int, *, normalized: bool = True
) -> dict[str, torch.Tensor]:
    """0-d float32 tensors on the inputs' device. ``h`` is normalised per level here where it is not yet.

    ``rankme``: effective rank (arXiv:2210.02885) of the last level of the target ``h``. ``feature_std``: mean over
    channels of the standard deviation over tokens of the last level of the student ``z``. ``target_var``: mean over the
    channels of all levels of the variance over tokens of ``h``; 0 when every token has the same target.
    """
    width = h_BND.shape[-1] // levels
    every, z = _rows(h_BND, h_BND.shape[-1]), _rows(z_BKD, width)
    if not normalized:
        every = target_norm(every, levels)
    h = every[:, -width:]
    return {
        "rankme": torch.as_tensor(geometry.rankme(h)).float(),
        "feature_std": torch.as_tensor(geometry.feature_std(z)).float(),
        "target_var": every.var(dim=0, unbiased=False).mean(),
    }
