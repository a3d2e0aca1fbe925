"""SIGReg: features look like an isotropic Gaussian (LeJEPA, arXiv:2511.08544).

N rows x of all masks' z; random unit directions a, drawn from (seed, step), as published from the step alone; u = x a.
Mean over the directions of the statistic of `objectives.epps_pulley`
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from vjepa_fast import ops
from vjepa_fast.objectives.api import Objective, TermContext, number, objective
from vjepa_fast.objectives.epps_pulley import POINTS, directions, draw, epps_pulley
from vjepa_fast.objectives.state import LatentState

_CHUNK = 1 << 22  # projections x t values kept at once; the rest is recomputed in the backward pass


@objective("sigreg")
@dataclass(frozen=True)
class Sigreg(Objective):
    """Epps-Pulley statistic against N(0, 1) of N rows along random directions, times N, mean over directions."""

    access = "GLOBAL"
    needs = frozenset({"z", "step"})
    gradient_to = "z"
    published = {"coeff": "optimization.sigreg_coeff", "num_slices": "optimization.sigreg_num_slices"}

    num_slices: int = number(1024, low=1, most=1_000_000)

    def draw(self, state: LatentState, ctx: TermContext, device: torch.device) -> Tensor:
        """Normal numbers [D, num_slices], float32: a function of (seed, step) and the kind of device.

        As published, of the step alone: the released code takes LeJEPA's library, whose generator is seeded with how
        often the term was computed before, once in each optimiser step, whatever the run's seed.
        """
        assert state.step is not None
        seed = 0 if ctx.compat == "published" else ctx.seed
        return draw(ctx.dim, self.num_slices, seed=seed, step=state.step, device=device)

    def value(self, state: LatentState, head: nn.Module | None, ctx: TermContext) -> Tensor:
        places = [(i, j) for i, zs in enumerate(state.z) for j in range(len(zs))]
        x_ND = torch.cat([state.context(i, j).flatten(0, 1) for i, j in places])
        reals = [s.real[0] for s in (state.stream(i, j) for i, j in places) if s is not None]
        real_N = torch.cat(reals) if reals else None
        a_DS = directions(state.drawn[self.name].to(torch.promote_types(x_ND.dtype, torch.float32)))
        per_pass = max(1, _CHUNK // (x_ND.shape[0] * POINTS))
        total = a_DS.new_zeros(())
        for part in a_DS.split(per_pass, dim=1):
            if part.shape[1] == a_DS.shape[1]:
                return epps_pulley(ops.matmul32(x_ND, part), real_N).mean()
            total = total + checkpoint(_sum, x_ND, part, real_N, use_reentrant=False, preserve_rng_state=False)
        return total / self.num_slices


def _sum(x_ND: Tensor, a_DS: Tensor, real_N: Tensor | None) -> Tensor:
    return epps_pulley(ops.matmul32(x_ND, a_DS), real_N).sum()
