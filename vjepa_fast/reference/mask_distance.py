"""Distance of every context token to the nearest predicted one, a token at a time, as published."""

from __future__ import annotations

import torch


def positions(indices, grid):
    """``[B,K]`` token indices -> ``[B,K,3]`` float32 (t, y, x)."""
    _, height, width = grid
    t = indices // (height * width)
    y = (indices - t * height * width) // width
    x = indices - t * height * width - y * width
    return torch.stack([t, y, x], dim=-1).float()


def mask_distance(mask_enc, mask_pred, grid, offset: bool = False):
    """float32 ``[B,Ke]``: square root of the Euclidean distance to the nearest token of ``mask_pred [B,Kp]``.

    ``offset`` divides the distance by the grid's height // 16 first; under 16 a ZeroDivisionError, as published.
    """
    enc, pred = positions(mask_enc, grid), positions(mask_pred, grid)
    distances = []
    for token in range(mask_enc.shape[1]):
        nearest = torch.cdist(enc[:, token : token + 1], pred, p=2).min(dim=-1).values
        if offset:
            nearest = nearest * (1.0 / (grid[1] // 16))
        distances.append(nearest**0.5)
    return torch.stack(distances, dim=-1).squeeze(1)
