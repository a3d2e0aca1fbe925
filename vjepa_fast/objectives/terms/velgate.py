"""Velocity gate: context features stay still where the target does (arXiv:2605.17165).

vel = L2 norm over D of h(t+1) - h(t);  gate = vel <= its percentile over the places of that sample and time step;
mean over pairs and channels of gate x abs(z(t+1) - z(t)).  h is detached; closed pairs count as zeros.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from vjepa_fast import ops
from vjepa_fast.objectives.api import Objective, number, objective
from vjepa_fast.objectives.reduce import mean_of_entries
from vjepa_fast.objectives.rows import STEP, zeros
from vjepa_fast.objectives.state import by_rows
from vjepa_fast.ops.latent import RowFunction


def _speed(z0, z1, h0, h1, p):
    d = h1 - h0
    return d * d, zeros(d), zeros(d)


def _speed_device():
    import triton
    import triton.language as tl

    @triton.jit
    def speed(z0, z1, h0, h1, p):
        d = h1 - h0
        return d * d, tl.zeros_like(d), tl.zeros_like(d)

    return speed


SPEED = RowFunction("speed", "PAIR", _speed, _speed_device, cpp=8, reads="h")


@objective("velgate")
@dataclass(frozen=True)
class VelocityGate(Objective):
    access = "PAIR"
    needs = frozenset({"z", "h", "masks_enc", "grids"})
    gradient_to = "z"

    percentile: float = number(0.5, low=0.0, high=1.0)

    def lower(self, ctx):
        return (STEP(),)

    def value(self, state, head, ctx) -> Tensor:
        entries = []
        for view in state.temporal():
            gate_BN = state.once(("velgate", view.i, self.percentile), lambda i=view.i: self._gate(state, i, ctx))
            entries.append(view.mean(view.rows(*self.lower(ctx)) * by_rows(gate_BN, view.idx).gather(1, view.idx)))
        return mean_of_entries(entries, state.outputs("z"))

    def _gate(self, state, i: int, ctx) -> Tensor:
        """1 where the target is slow, [B, N] (0 at the last time step, where no pair starts)."""
        t, height, width = state.grids[i]
        h_BND = state.h[i].detach()
        rows_BN = ops.latent_loss_pair(
            h_BND,
            h_BND,
            *state.grid_pairs(i),
            [SPEED()],
            places=height * width,
            levels=ctx.levels,
            normalize=not state.h_normalized,
        )[0]
        speed_BTS = (rows_BN * ctx.dim).sqrt().unflatten(1, (t, height * width))[:, :-1]
        slow = speed_BTS <= torch.quantile(speed_BTS, self.percentile, dim=-1, keepdim=True)
        return torch.nn.functional.pad(slow.to(rows_BN.dtype), (0, 0, 0, 1)).flatten(1)
