"""Kinematic sparsity: the target features themselves change little over time (arXiv:2605.17165).

    d = h(t+1) - h(t) at every grid token.  l1: mean abs(d).  huber: Huber(d, delta 0.1).
    acceleration: mean abs(h(t+2) - 2 h(t+1) + h(t)) if T >= 3, else l1.

Acts on ``h`` alone, so it needs a target that carries gradient (no EMA). Groups with one time step are left out; the
published code still divides by the number of all groups. ``anneal``: coefficient/2 (1 + cos(pi epoch/epochs)).
"""
from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from ..api import Objective, choice, flag, number, objective
from ..reduce import connected_zero


@objective("kinematic")
@dataclass(frozen=True)
class Kinematic(Objective):
    access = "PAIR"
    needs = frozenset({"h", "grids"})
    gradient_to = "h"

    type: str = choice("l1", "l1", "acceleration", "huber")
    split_ratio: float = number(1.0, above=0.0, high=1.0)
    anneal: bool = flag(False)

    def refusal(self, ctx, target_grad) -> str | None:
        if target_grad:
            return None
        return "it acts on the target, which is an EMA copy; set target.mode: online (target_grad=True)"

    def weight(self, state) -> float:
        if not self.anneal:
            return self.coeff
        if state.epoch is None or state.epochs is None:
            raise ValueError("objectives.kinematic.anneal needs LatentState.epoch and LatentState.epochs")
        return self.coeff * 0.5 * (1 + math.cos(math.pi * state.epoch / state.epochs))

    def value(self, state, head, ctx) -> Tensor:
        kept = max(1, int(ctx.dim * self.split_ratio))
        values = []
        for i, (t, height, width) in enumerate(state.grids):
            if t >= 2:
                h_BTSD = state.target(i, grad=True).unflatten(1, (t, height * width))[..., :kept]
                values.append(self._change(h_BTSD))
        if not values:
            return connected_zero(state.h)
        groups = len(state.grids) if ctx.compat == "published" else len(values)
        return torch.stack(values).sum() / groups

    def _change(self, h_BTSD: Tensor) -> Tensor:
        d = h_BTSD[:, 1:] - h_BTSD[:, :-1]
        if self.type == "huber":
            return F.huber_loss(d, torch.zeros_like(d), delta=0.1)
        if self.type == "acceleration" and d.shape[1] >= 2:
            d = d[:, 1:] - d[:, :-1]
        return d.abs().mean()
