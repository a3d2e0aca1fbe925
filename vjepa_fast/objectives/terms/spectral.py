"""Spectral: temporal spectra of context features and target agree, fast changes counting more (Spectral-JEPA).

    over the places that are visible at every t: mean of a_f abs(rfft_t(z - h)), a = linspace(0.1, 1, T//2 + 1)

arXiv:2605.17165. Grids with fewer than 4 time steps are left out. h is detached.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from vjepa_fast.objectives.api import Objective, TermContext, objective
from vjepa_fast.objectives.reduce import Entry, mean_of_entries
from vjepa_fast.objectives.state import LatentState, computing
from vjepa_fast.ops.latent import RowCall, RowFunction


def _spectrum(z: Tensor, h: Tensor, constants: Tensor) -> tuple[Tensor, Tensor]:
    """[B,T,P,D], [B,T,P,D], [2F,T] -> mean over f of a_f abs(rfft_t(z - h)) [B,P,D] and its slope [B,T,P,D].

    Rows of ``constants``: the F cosines, then the F sines of the real DFT, each times a_f / F.
    """
    lines = torch.einsum("ft,btpd->bfpd", constants, z - h)
    real, imaginary = lines.chunk(2, 1)
    modulus = torch.hypot(real, imaginary)
    inverse = torch.where(modulus > 0, modulus, torch.inf).reciprocal()  # slope 0 where the modulus is 0
    slope = torch.einsum("ft,bfpd->btpd", constants, torch.cat([real * inverse, imaginary * inverse], 1))
    return modulus.sum(1), slope


def _spectrum_device() -> Any:
    import triton
    import triton.language as tl

    @triton.jit
    def spectrum(z: tl.tensor, h: tl.tensor, constants: tl.tensor, C: tl.tensor, T: tl.tensor) -> tuple[tl.tensor, ...]:
        # ignored types: Triton declares a shape as an empty tuple
        t = tl.arange(0, z.shape[0])  # pyright: ignore[reportArgumentType, reportGeneralTypeIssues]  # Triton
        gap = z - h
        value = tl.zeros([z.shape[1]], dtype=tl.float32)  # pyright: ignore[reportArgumentType, reportGeneralTypeIssues]  # Triton
        slope = tl.zeros_like(gap)
        for f in range(C // 2):
            cosine = tl.load(constants + f * T + t, mask=t < T, other=0.0)[:, None]
            sine = tl.load(constants + (f + C // 2) * T + t, mask=t < T, other=0.0)[:, None]
            real, imaginary = tl.sum(cosine * gap, 0), tl.sum(sine * gap, 0)
            modulus = tl.sqrt(real * real + imaginary * imaginary)
            inverse = tl.where(modulus > 0, 1.0 / modulus, 0.0)
            value += modulus
            slope += cosine * (real * inverse)[None, :] + sine * (imaginary * inverse)[None, :]
        return value, slope

    return spectrum


SPECTRUM = RowFunction("spectrum", "COLUMN", _spectrum, _spectrum_device, cpp=0)


@objective("spectral")
@dataclass(frozen=True)
class Spectral(Objective):
    """places seen at every t, T >= 4: mean a_f abs(rfft_t(z - h)), a = linspace(0.1, 1)."""

    access = "COLUMN"
    needs = frozenset({"z", "h", "masks_enc", "grids"})
    gradient_to = "z, where a place is visible throughout"
    published = {"coeff": "optimization.spectral_coeff"}

    def lower(self, ctx: TermContext) -> tuple[RowCall, ...]:
        return (SPECTRUM(),)

    def value(self, state: LatentState, head: nn.Module | None, ctx: TermContext) -> Tensor:
        entries: list[Entry] = []
        for view in state.temporal(min_steps=4):
            z_BKD = state.z[view.i][view.j]
            basis = state.once(("dft", view.steps), partial(weighted_dft, view.steps, computing(z_BKD[:0])))
            entries.append(view.column_mean(view.column_rows(SPECTRUM(), basis)))
        return mean_of_entries(entries, state.outputs("z"))


def weighted_dft(steps: int, like: Tensor) -> Tensor:
    """The real DFT as a matrix [2 * F, steps], F = steps//2 + 1: cosine rows, then sine rows, times a_f / F."""
    t = torch.arange(steps, device=like.device, dtype=like.dtype)
    frequencies = steps // 2 + 1
    angle_FT = torch.arange(frequencies, device=like.device)[:, None] * t * (2 * math.pi / steps)
    weight_F = torch.linspace(0.1, 1.0, frequencies, dtype=like.dtype, device=like.device) / frequencies
    return torch.cat([angle_FT.cos() * weight_F[:, None], -angle_FT.sin() * weight_F[:, None]])
