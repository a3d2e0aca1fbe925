"""How much of their space a set of features uses: collapse monitors for training and evaluation.

Pure torch, any device, nothing read back here (a decomposition may look at its input by itself): every function returns
a 0-d float32 tensor, or ``[k]`` of them in a dict. Shapes: ``n`` samples (or tokens), ``q`` views of one clip, ``d``
channels; further leading axes are flattened into ``n``. Features that are not finite give NaN, no error: to see them
would mean to wait for the device. What each figure shows: docs/geometry.md.
"""

from __future__ import annotations

import torch
from torch import Tensor

MIN_FIT = 3  # eigenvalues that a slope is fitted to, at least


def _rows(x: Tensor) -> Tensor:
    if x.ndim < 2 or x.shape[-1] == 0 or x.numel() == 0:
        raise ValueError(f"features must be [..., n, d] and not empty, got shape {tuple(x.shape)}")
    return x.detach().reshape(-1, x.shape[-1]).float()


def _decompose(f, x: Tensor) -> Tensor:
    """``f(x)`` of a torch.linalg function that raises where ``x`` is not finite: NaN takes the error's place."""
    finite = torch.isfinite(x).all()
    return torch.where(finite, f(torch.where(finite, x, 0.0)), torch.nan)


def _effective_rank(s: Tensor, eps: float) -> Tensor:
    """``exp(H(p))`` with ``p = s / sum(s) + eps`` over the last axis."""
    p = s / s.sum(-1, keepdim=True).clamp_min(torch.finfo(s.dtype).tiny) + eps
    return torch.exp(-(p * p.log()).sum(-1))


def rankme(x: Tensor, eps: float = 1e-7) -> Tensor:
    """Effective rank ``exp(H(p))``, ``p = s / sum(s) + eps`` of the singular values ``s`` of ``x`` ``[n, d]``, not
    centred.

    Between 1 (all rows on a line) and ``min(n, d)``. Zero features give about 1, as a collapsed encoder should.
    Source: RankMe, arXiv:2210.02885, equation 1.
    """
    return _effective_rank(_decompose(torch.linalg.svdvals, _rows(x)), eps)


def fit_range(n: int, d: int) -> tuple[int, int]:
    """Which eigenvalues :func:`alpha_req` fits for features ``[n, d]``: first and last, counted from 1, both included.

    11 to 100, as the authors' library does, where centred features have over 110 of them. Where ``r = min(n - 1, d)``
    is less, the first and the last tenth are left out: the head and the tail follow the sample, not the law. The range
    holds fewer than ``MIN_FIT`` eigenvalues, too few for a slope, where ``r`` is under 3.
    """
    r = max(0, min(n - 1, d))
    return min(11, 1 + r // 10), min(100, r - r // 10)


def _slope(eigenvalues: Tensor, n: int, d: int) -> Tensor:
    """``alpha`` of descending eigenvalues ``[..., r]`` of the covariance of ``[n, d]``; NaN where it is not defined."""
    first, last = fit_range(n, d)
    if last - first + 1 < MIN_FIT:
        return torch.full_like(eigenvalues[..., 0], torch.nan)
    values = eigenvalues[..., first - 1 : last]
    # a singular value below max(n, d) * eps of the largest is rounding (numpy's matrix_rank): that one is 0
    floor = eigenvalues[..., :1] * (max(n, d) * torch.finfo(torch.float32).eps) ** 2
    above = (values > floor).all(-1)
    i = torch.arange(first, last + 1, device=values.device, dtype=values.dtype)
    x, w = i.log(), 1 / i
    x = x - (w * x).sum() / w.sum()
    alpha = -(w * x * values.clamp_min(torch.finfo(values.dtype).tiny).log()).sum(-1) / (w * x * x).sum()
    return torch.where(above, alpha, torch.nan)


def alpha_req(x: Tensor) -> Tensor:
    """``alpha`` of the power law ``lambda_i ~ i^-alpha`` that the eigenvalues of the covariance of ``x`` ``[n, d]``
    follow.

    The negative slope of ``log lambda_i`` over ``log i``, least squares with weights ``1/i``, over the eigenvalues of
    :func:`fit_range`. NaN where the range holds fewer than ``MIN_FIT`` of them or one that is zero (features of lower
    rank): such a spectrum follows no power law. Source: alpha-ReQ, Agrawal et al., NeurIPS 2022, whose authors' code
    gives the weights.
    """
    rows = _rows(x)
    s = _decompose(torch.linalg.svdvals, rows - rows.mean(0))
    return _slope(s.square(), *rows.shape)


def lidar(x: Tensor, delta: float = 1e-4, eps: float = 1e-7) -> Tensor:
    """Effective rank of ``Sw^-1/2 Sb Sw^-1/2`` for ``x`` ``[n, q, d]``: ``q`` views of each of ``n`` clips, n, q >= 2.

    ``Sb``: covariance of the clips' means; ``Sw``: mean covariance of the views about their clip's mean, plus ``delta``
    times the identity. The rank counts the directions in which clips differ by more than their views do; between 1 and
    ``min(n - 1, d)``. Computed in float64. Source: LiDAR, arXiv:2312.04000.
    """
    if x.ndim != 3 or x.shape[0] < 2 or x.shape[1] < 2 or x.shape[2] == 0:
        raise ValueError(f"lidar needs [clips, views, d], two or more clips and views, got shape {tuple(x.shape)}")
    n, q, d = x.shape
    x = x.detach().double()
    finite = torch.isfinite(x).all()
    x = torch.where(finite, x, 0.0)
    means = x.mean(1)
    within, between = (x - means[:, None]).flatten(0, 1), means - means.mean(0)
    covariance = within.mT @ within / (n * q) + delta * torch.eye(d, dtype=x.dtype, device=x.device)
    # with Sw = L L^T the eigenvalues are those of (L^-1 B^T)(L^-1 B^T)^T / n: no matrix root, and n columns are enough
    root = torch.linalg.cholesky(covariance)
    whitened = torch.linalg.solve_triangular(root, between.mT, upper=False)
    eigenvalues = torch.linalg.svdvals(whitened).square() / n
    return torch.where(finite, _effective_rank(eigenvalues, eps), torch.nan).float()


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


def spectra(parts: list[Tensor], eps: float = 1e-7) -> dict[str, Tensor]:
    """``rankme`` and ``alpha_req``, float32 ``[k]`` each, of ``k`` feature sets ``[n, d_i]`` of the same ``n`` rows.

    The figures of the functions above from one batched decomposition of the ``n x n`` products of the rows: what the
    training log can afford. In float64, as products square the condition (float32 on MPS, which has no other).
    """
    parts = [_rows(x) for x in parts]
    dtype = torch.float32 if parts[0].device.type == "mps" else torch.float64
    grams = []
    for rows in parts:
        rows = rows.to(dtype)
        grams += [rows @ rows.mT, (rows - rows.mean(0)) @ (rows - rows.mean(0)).mT]
    values = _decompose(torch.linalg.eigvalsh, torch.stack(grams)).clamp_min(0).flip(-1)
    ranks, slopes = [], []
    for x, plain, centred in zip(parts, values[0::2], values[1::2]):
        r = min(x.shape)  # the n - r others are zero but for rounding
        ranks.append(_effective_rank(plain[:r].sqrt(), eps))
        slopes.append(_slope(centred[:r], *x.shape))
    return {"rankme": torch.stack(ranks).float(), "alpha_req": torch.stack(slopes).float()}
