"""Kinematic sparsity: the target features themselves change little over time (arXiv:2605.17165).

    d = h(t+1) - h(t) at every grid token.  l1: mean abs(d).  huber: Huber(d, delta 0.1).
    acceleration: mean abs(h(t+2) - 2 h(t+1) + h(t)) if T >= 3, else l1.

Acts on ``h`` alone, so it needs a target that carries gradient (no EMA). Groups with one time step are left out; the
published code still divides by the number of all groups. ``anneal``: coefficient/2 (1 + cos(pi epoch/epochs)).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from vjepa_fast import ops
from vjepa_fast.objectives.api import Objective, TermContext, choice, flag, number, objective
from vjepa_fast.objectives.reduce import connected_zero
from vjepa_fast.objectives.rows import STEP, PairRow
from vjepa_fast.objectives.state import LatentState
from vjepa_fast.ops.latent import RowCall, RowFunction

_DELTA = 0.1  # of the Huber function


def _huber(z0: Tensor, z1: Tensor, h0: Tensor, h1: Tensor, p: float) -> PairRow:
    d = z1 - z0
    size = d.abs()
    s = torch.where(size <= _DELTA, d, _DELTA * d.sign())
    return torch.where(size <= _DELTA, 0.5 * d * d, _DELTA * (size - 0.5 * _DELTA)), -s, s


def _huber_device() -> Any:
    import triton
    import triton.language as tl

    @triton.jit
    def huber(z0: tl.tensor, z1: tl.tensor, h0: tl.tensor, h1: tl.tensor, p: tl.tensor) -> tuple[tl.tensor, ...]:
        d = z1 - z0
        size = tl.abs(d)
        s = tl.where(size <= 0.1, d, tl.where(d > 0, 0.1, -0.1))
        return tl.where(size <= 0.1, 0.5 * d * d, 0.1 * (size - 0.05)), -s, s

    return huber


HUBER = RowFunction("huber", "PAIR", _huber, _huber_device, cpp=2, reads="z")


@objective("kinematic")
@dataclass(frozen=True)
class Kinematic(Objective):
    """mean abs(h(t+1) - h(t)); `acceleration`: second difference; `huber`: Huber with delta 0.1."""

    access = "PAIR"
    needs = frozenset({"h", "grids"})
    gradient_to = "h"
    published = {
        "coeff": "optimization.kinematic_coeff",
        "type": "optimization.kinematic_type",
        "split_ratio": "optimization.kinematic_split_ratio",
        "anneal": "optimization.kinematic_anneal",
    }

    type: str = choice("l1", "l1", "acceleration", "huber")
    split_ratio: float = number(1.0, above=0.0, high=1.0)
    anneal: bool = flag(False)

    def refusal(self, ctx: TermContext, target_grad: bool) -> str | None:
        if target_grad:
            return None
        return "it acts on the target, which is an EMA copy; set target.mode: online (target_grad=True)"

    def weight(self, state: LatentState) -> float:
        if not self.anneal:
            return self.coeff
        if state.epoch is None or state.epochs is None:
            raise ValueError("objectives.kinematic.anneal needs LatentState.epoch and LatentState.epochs")
        return self.coeff * 0.5 * (1 + math.cos(math.pi * state.epoch / state.epochs))

    def lower(self, ctx: TermContext) -> tuple[RowCall, ...]:
        kept = max(1, int(ctx.dim * self.split_ratio))  # acceleration spans three time steps: plain PyTorch
        return ((HUBER if self.type == "huber" else STEP)(window=(0, kept, ctx.dim)),)

    def value(self, state: LatentState, head: nn.Module | None, ctx: TermContext) -> Tensor:
        values: list[Tensor] = []
        for i, (t, height, width) in enumerate(state.grids):
            if t >= 2:
                h_BND = state.target(i, grad=True)
                if self.type == "acceleration" and t >= 3:
                    values.append(self._acceleration(h_BND.unflatten(1, (t, height * width)), ctx))
                else:
                    values.append(self._change(h_BND, state.grid_pairs(i), height * width, ctx))
        if not values:
            return connected_zero(state.h)
        groups = len(state.grids) if ctx.compat == "published" else len(values)
        return torch.stack(values).sum() / groups

    def _change(self, h_BND: Tensor, pairs: tuple[Tensor, Tensor, Tensor], places: int, ctx: TermContext) -> Tensor:
        rows_BN = ops.latent_loss_pair(h_BND, h_BND, *pairs, self.lower(ctx), places=places, levels=ctx.levels)[0]
        b, n, _ = h_BND.shape
        return rows_BN.sum() / max(1, b * (n - places))  # rows of the last time step are 0

    def _acceleration(self, h_BTSD: Tensor, ctx: TermContext) -> Tensor:
        h_BTSD = h_BTSD[..., : max(1, int(ctx.dim * self.split_ratio))]
        d = h_BTSD[:, 1:] - h_BTSD[:, :-1]
        return (d[:, 1:] - d[:, :-1]).abs().mean()
