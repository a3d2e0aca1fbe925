"""Spectral: temporal spectra of context features and target agree, fast changes counting more (Spectral-JEPA).

    over the places that are visible at every t: mean of a_f abs(rfft_t(z - h)), a = linspace(0.1, 1, T//2 + 1)

arXiv:2605.17165. Grids with fewer than 4 time steps are left out. h is detached.
"""
from __future__ import annotations

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
            z_BTSD, seen_BS = view.columns
            gap = z_BTSD - state.target(view.i, grad=False).view_as(z_BTSD)
            gap = gap.masked_fill(~seen_BS[:, None, :, None], 0.0)
            modulus_BFSD = torch.fft.rfft(gap, dim=1).abs()
            weight_F = torch.linspace(0.1, 1.0, modulus_BFSD.shape[1], dtype=gap.dtype, device=gap.device)
            error_BS = (modulus_BFSD.mean(-1) * weight_F[:, None]).mean(1)
            entries.append((error_BS.sum() / seen_BS.sum().clamp(min=1), seen_BS.any()))
        return mean_of_entries(entries, state.outputs("z"))
