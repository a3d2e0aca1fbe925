"""SIGReg: features look like an isotropic Gaussian (LeJEPA, arXiv:2511.08544).

    N rows x of all masks' z; random unit directions a, drawn from (seed, step); u = x a. With t = linspace(0, 3, 17),
    statistic = N sum_t w_t [(mean cos(t u) - exp(-t^2/2))^2 + (mean sin(t u))^2], mean over the directions,
    w = trapezoid weights (dt at both ends, 2 dt inside: the integral over [-3, 3]) x exp(-t^2/2)
"""
from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from ..api import Objective, number, objective
from ..state import computing

POINTS, T_MAX = 17, 3.0
_CHUNK = 1 << 22  # projections x t values kept at once; the rest is recomputed in the backward pass


@objective("sigreg")
@dataclass(frozen=True)
class Sigreg(Objective):
    access = "GLOBAL"
    needs = frozenset({"z", "step"})
    gradient_to = "z"

    num_slices: int = number(1024, low=1, integer=True)

    def value(self, state, head, ctx) -> Tensor:
        x_ND = torch.cat([computing(z).flatten(0, 1) for z in state.outputs("z")])
        a_DS = directions(x_ND.shape[1], self.num_slices, ctx.seed, state.step, x_ND)
        per_pass = max(1, _CHUNK // (x_ND.shape[0] * POINTS))
        total = x_ND.new_zeros(())
        for part in a_DS.split(per_pass, dim=1):
            if part.shape[1] == a_DS.shape[1]:
                return epps_pulley(x_ND @ part).mean()
            total = total + checkpoint(_sum, x_ND, part, use_reentrant=False, preserve_rng_state=False)
        return total / self.num_slices


def directions(dim: int, count: int, seed: int, step: int, like: Tensor) -> Tensor:
    """``count`` unit columns [dim, count], a function of (seed, step) and the kind of device."""
    generator = torch.Generator(device=like.device).manual_seed((seed * 1_000_003 + step) % (1 << 62))
    a_DS = torch.randn(dim, count, generator=generator, device=like.device, dtype=torch.float32).to(like.dtype)
    return a_DS / torch.linalg.vector_norm(a_DS, dim=0, keepdim=True)


def epps_pulley(u_NS: Tensor) -> Tensor:
    """The statistic of each column of ``u`` against N(0, 1), [S]."""
    t = torch.linspace(0.0, T_MAX, POINTS, dtype=u_NS.dtype, device=u_NS.device)
    gauss = torch.exp(-0.5 * t * t)
    weight = torch.full_like(t, 2 * T_MAX / (POINTS - 1))
    weight[0] = weight[-1] = T_MAX / (POINTS - 1)
    tu_NSP = u_NS.unsqueeze(-1) * t
    gap = (tu_NSP.cos().mean(0) - gauss).square() + tu_NSP.sin().mean(0).square()
    return u_NS.shape[0] * (gap @ (weight * gauss))


def _sum(x_ND: Tensor, a_DS: Tensor) -> Tensor:
    return epps_pulley(x_ND @ a_DS).sum()
