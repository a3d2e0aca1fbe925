"""How much of their space a set of features uses: collapse monitors for training and evaluation.

Pure torch, any device, no host sync: every function returns a 0-d float32 tensor. Shapes: ``n`` samples (or tokens),
``d`` channels; further leading axes are flattened into ``n``.
"""

from __future__ import annotations

import torch
from torch import Tensor


def _rows(x: Tensor) -> Tensor:
    if x.ndim < 2 or x.shape[-1] == 0 or x.numel() == 0:
        raise ValueError(f"features must be [..., n, d] and not empty, got shape {tuple(x.shape)}")
    return x.detach().reshape(-1, x.shape[-1]).float()


def rankme(x: Tensor, eps: float = 1e-7) -> Tensor:
    """Effective rank ``exp(H(p))``, ``p = s / sum(s) + eps`` of the singular values ``s`` of ``x`` ``[n, d]``, not
    centred.

    Between 1 (all rows on a line) and ``min(n, d)``. Zero features give about 1, as a collapsed encoder should.
    Source: RankMe, arXiv:2210.02885, equation 1.
    """
    s = torch.linalg.svdvals(_rows(x))
    p = s / s.sum().clamp_min(torch.finfo(s.dtype).tiny) + eps
    return torch.exp(-(p * p.log()).sum())


def feature_std(x: Tensor) -> Tensor:
    """Mean over the channels of the (population) standard deviation over the rows of ``x`` ``[n, d]``; 0 means
    collapse.
    """
    return _rows(x).std(dim=0, correction=0).mean()


def mean_cosine(x: Tensor, eps: float = 1e-8) -> Tensor:
    """Mean cosine between two different rows of ``x`` ``[n, d]``, n >= 2; near 1 means that all rows point the same
    way.
    """
    rows = _rows(x)
    n = rows.shape[0]
    if n < 2:
        raise ValueError("mean_cosine needs at least two rows")
    unit = rows / rows.norm(dim=1, keepdim=True).clamp_min(eps)
    # the sum over all pairs is the squared norm of the sum of the unit rows; the diagonal is taken off
    return (unit.sum(0).square().sum() - unit.square().sum()) / (n * (n - 1))
