"""Velocity gate: context features stay still where the target does (arXiv:2605.17165).

    vel = L2 norm over D of h(t+1) - h(t);  gate = vel <= its percentile over the places of that sample and time step;
    mean over pairs and channels of gate x abs(z(t+1) - z(t)).  h is detached; closed pairs count as zeros.
"""
from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..api import Objective, number, objective
from ..reduce import mean_of_entries


@objective("velgate")
@dataclass(frozen=True)
class VelocityGate(Objective):
    access = "PAIR"
    needs = frozenset({"z", "h", "masks_enc", "grids"})
    gradient_to = "z"

    percentile: float = number(0.5, low=0.0, high=1.0)

    def value(self, state, head, ctx) -> Tensor:
        entries = []
        for view in state.temporal():
            gate_BN = state.once(("velgate", view.i, self.percentile), lambda i=view.i: self._gate(state, i))
            open_BK = gate_BN.gather(1, view.idx)
            entries.append(view.mean(view.z_step.abs().mean(-1) * open_BK))
        return mean_of_entries(entries, state.outputs("z"))

    def _gate(self, state, i: int) -> Tensor:
        """1 where the target is slow, [B, N] (0 at the last time step, where no pair starts)."""
        t, height, width = state.grids[i]
        h_BTSD = state.target(i, grad=False).unflatten(1, (t, height * width))
        speed_BTS = torch.linalg.vector_norm(h_BTSD[:, 1:] - h_BTSD[:, :-1], dim=-1)
        slow = speed_BTS <= torch.quantile(speed_BTS, self.percentile, dim=-1, keepdim=True)
        return torch.nn.functional.pad(slow.to(h_BTSD.dtype), (0, 0, 0, 1)).flatten(1)
