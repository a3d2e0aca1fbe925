"""Velocity gate: context features stay still where the target does (arXiv:2605.17165).

vel = L2 norm over D of h(t+1) - h(t);  gate = vel <= its percentile over the places of that sample and time step;
mean over pairs and channels of gate x abs(z(t+1) - z(t)).  h is detached; closed pairs count as zeros.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from vjepa_fast import ops
from vjepa_fast.objectives.api import Objective, TermContext, number, objective
from vjepa_fast.objectives.reduce import Entry, mean_of_entries
from vjepa_fast.objectives.rows import STEP, PairRow
from vjepa_fast.objectives.state import LatentState, by_rows
from vjepa_fast.ops.latent import RowCall, RowFunction


def _speed(z0: Tensor, z1: Tensor, h0: Tensor, h1: Tensor, p: float) -> PairRow:
    d = h1 - h0
    return d * d, torch.zeros_like(d), torch.zeros_like(d)


def _speed_device() -> Any:
    import triton
    import triton.language as tl

    @triton.jit
    def speed(z0: tl.tensor, z1: tl.tensor, h0: tl.tensor, h1: tl.tensor, p: tl.tensor) -> tuple[tl.tensor, ...]:
        d = h1 - h0
        return d * d, tl.zeros_like(d), tl.zeros_like(d)

    return speed


SPEED = RowFunction("speed", "PAIR", _speed, _speed_device, cpp=8, reads="h")


@objective("velgate")
@dataclass(frozen=True)
class VelocityGate(Objective):
    """gate = speed of h at most its percentile over the places of (sample, t); mean over pairs of gate x abs(z(t+1) -
    z(t)).
    """

    access = "PAIR"
    needs = frozenset({"z", "h", "masks_enc", "grids"})
    gradient_to = "z"
    published = {"coeff": "optimization.velgate_coeff", "percentile": "optimization.velgate_percentile"}

    percentile: float = number(0.5, low=0.0, high=1.0)

    def lower(self, ctx: TermContext) -> tuple[RowCall, ...]:
        return (STEP(),)

    def value(self, state: LatentState, head: nn.Module | None, ctx: TermContext) -> Tensor:
        entries: list[Entry] = []
        for view in state.temporal():
            gate_BN = state.once(("velgate", view.i, self.percentile), partial(self._gate, state, view.i, ctx))
            entries.append(view.mean(view.rows(*self.lower(ctx)) * by_rows(gate_BN, view.idx).gather(1, view.idx)))
        return mean_of_entries(entries, state.outputs("z"))

    def _gate(self, state: LatentState, i: int, ctx: TermContext) -> Tensor:
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
