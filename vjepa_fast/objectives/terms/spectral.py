"""Spectral: temporal spectra of context features and target agree, fast changes counting more (Spectral-JEPA).

    over the places that are visible at every t: mean of a_f abs(rfft_t(z - h)), a = linspace(0.1, 1, T//2 + 1)

arXiv:2605.17165. Grids with fewer than 4 time steps are left out. h is detached.
"""
from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ..api import Objective, objective
from ..reduce import mean_of_entries


@objective("spectral")
@dataclass(frozen=True)
class Spectral(Objective):
    access = "COLUMN"
    needs = frozenset({"z", "h", "masks_enc", "grids"})
    gradient_to = "z, where a place is visible throughout"

    def value(self, state, head, ctx) -> Tensor:
        entries = []
        for view in state.temporal(min_steps=4):
            gap_BTPD, seen_BP = view.columns
            b, steps, places, d = gap_BTPD.shape
            frequencies = steps // 2 + 1
            lines = (fourier_basis(steps, gap_BTPD) @ gap_BTPD.flatten(2)).view(b, 2, frequencies, places, d)
            modulus_BFPD = torch.linalg.vector_norm(lines, dim=1)  # gradient 0 where the modulus is 0
            weight_F = torch.linspace(0.1, 1.0, frequencies, dtype=lines.dtype, device=lines.device)
            error_BP = (modulus_BFPD.mean(-1) * weight_F[:, None]).mean(1)
            entries.append((error_BP.sum() / seen_BP.sum().clamp(min=1), seen_BP.any()))
        return mean_of_entries(entries, state.outputs("z"))


def fourier_basis(steps: int, like: Tensor) -> Tensor:
    """The real DFT as a matrix [2 * (steps//2 + 1), steps]: cosine rows, then sine rows. Clips are short."""
    t = torch.arange(steps, device=like.device, dtype=like.dtype)
    angle_FT = torch.arange(steps // 2 + 1, device=like.device)[:, None] * t * (2 * math.pi / steps)
    return torch.cat([angle_FT.cos(), -angle_FT.sin()])
