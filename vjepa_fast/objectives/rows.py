"""Row functions that several terms share; those of one term alone are in its file. See docs/kernels.md."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from vjepa_fast.ops._latent_powers import L1, POWER, SQUARE, power_error
from vjepa_fast.ops.latent import RowFunction

__all__ = ["L1", "POWER", "SQUARE", "STEP", "PairRow", "power_error"]
PairRow = tuple[Tensor, Tensor, Tensor]  # value, slope in z0, slope in z1


def _step_device() -> Any:
    import triton
    import triton.language as tl

    @triton.jit
    def step(z0: tl.tensor, z1: tl.tensor, h0: tl.tensor, h1: tl.tensor, p: tl.tensor) -> tuple[tl.tensor, ...]:
        d = z1 - z0
        s = tl.where(d > 0, 1.0, tl.where(d < 0, -1.0, 0.0))
        return tl.abs(d), -s, s

    return step


def _step(z0: Tensor, z1: Tensor, h0: Tensor, h1: Tensor, p: float) -> PairRow:
    d = z1 - z0
    return d.abs(), -d.sign(), d.sign()


STEP = RowFunction("step", "PAIR", _step, _step_device, cpp=0, reads="z")  # abs(z(t+1) - z(t))
