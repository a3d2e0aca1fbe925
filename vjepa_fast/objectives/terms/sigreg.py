"""SIGReg: features look like an isotropic Gaussian (LeJEPA, arXiv:2511.08544).

N rows x of all masks' z; random unit directions a, drawn from (seed, step), as published from the step alone; u = x a.
With t = linspace(0, 3, 17), statistic = N sum_t w_t [(mean cos(t u) - exp(-t^2/2))^2 + (mean sin(t u))^2], mean over
the directions, w = trapezoid weights (dt at both ends, 2 dt inside: the integral over [-3, 3]) x exp(-t^2/2)
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

from vjepa_fast import ops
from vjepa_fast.objectives.api import Objective, TermContext, number, objective
from vjepa_fast.objectives.state import LatentState

POINTS, T_MAX = 17, 3.0
_CHUNK = 1 << 22  # projections x t values kept at once; the rest is recomputed in the backward pass


class Together(Protocol):
    """Processes that compute one loss together."""

    world: int

    def mean(self, values: Tensor) -> Tensor:
        """Mean over the processes."""
        ...


@objective("sigreg")
@dataclass(frozen=True)
class Sigreg(Objective):
    """Epps-Pulley statistic against N(0, 1) of N rows along random directions, times N, mean over directions."""

    access = "GLOBAL"
    needs = frozenset({"z", "step"})
    gradient_to = "z"
    published = {"coeff": "optimization.sigreg_coeff", "num_slices": "optimization.sigreg_num_slices"}

    num_slices: int = number(1024, low=1)

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


def draw(dim: int, num_slices: int, *, seed: int, step: int, device: torch.device) -> Tensor:
    """Normal numbers [dim, num_slices], float32: a function of (seed, step) and the kind of device."""
    generator = torch.Generator(device).manual_seed((seed * 1_000_003 + step) % (1 << 62))
    return torch.randn(dim, num_slices, generator=generator, device=device, dtype=torch.float32)


def directions(normal_DS: Tensor) -> Tensor:
    """Unit columns [D, S] from normal numbers."""
    return normal_DS / torch.linalg.vector_norm(normal_DS, dim=0, keepdim=True)


class EppsPulley(torch.autograd.Function):
    """One cosine and one sine per projection: exp(i k theta) comes from turning k times, and nothing is kept per t."""

    @staticmethod
    def forward(ctx: Any, u_NS: Tensor, real_N: Tensor | None, points: int, together: Together | None) -> Tensor:
        dt = T_MAX / (points - 1)
        t = torch.linspace(0.0, T_MAX, points, dtype=u_NS.dtype, device=u_NS.device)
        gauss = torch.exp(-0.5 * t * t)
        weight = torch.full_like(t, 2 * dt)
        weight[-1:].fill_(dt)  # by an index, a number would be copied to the device
        weight = weight * gauss
        theta = u_NS * dt
        c1, s1 = theta.cos(), theta.sin()
        if real_N is None:
            rows = u_NS.shape[0]
            means = [(c.mean(0), s.mean(0)) for c, s in _turns(c1, s1, points)]
        else:  # both 0 stay so however often they are turned: filler is in no sum
            rows = real_N.sum()
            for x in (c1, s1):
                x.masked_fill_(~real_N[:, None], 0.0)
            means = [(c.sum(0) / rows, s.sum(0) / rows) for c, s in _turns(c1, s1, points)]
        mean_cos, mean_sin = (torch.stack(found) for found in zip(*means))
        world = 1
        if together is not None:
            mean_cos, mean_sin = together.mean(torch.stack((mean_cos, mean_sin))).unbind()
            world = together.world
        gap_cos, gap_sin = mean_cos - gauss[1:, None], mean_sin  # at t = 0 the gap is 0
        ctx.save_for_backward(c1, s1, gap_cos, gap_sin, (2 * world * weight * t)[1:, None])
        return world * rows * (weight[1:] @ (gap_cos.square() + gap_sin.square()))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_S: Tensor) -> tuple[Tensor, None, None, None]:  # pyright: ignore[reportIncompatibleMethodOverride]  # torch decorator
        c1, s1, gap_cos, gap_sin, factor = ctx.saved_tensors
        from_cos, from_sin = factor * gap_cos * grad_S, factor * gap_sin * grad_S
        grad = torch.zeros_like(c1)
        for k, (c, s) in enumerate(_turns(c1, s1, len(factor) + 1)):
            grad.addcmul_(c, from_sin[k]).addcmul_(s, from_cos[k], value=-1)
        return grad, None, None, None


def _turns(c1: Tensor, s1: Tensor, points: int) -> Iterator[tuple[Tensor, Tensor]]:
    """cos(k theta), sin(k theta) for k = 1 .. points - 1, by the angle addition formulas."""
    c, s = c1, s1
    yield c, s
    for _ in range(points - 2):
        c, s = (c * c1).addcmul_(s, s1, value=-1), (s * c1).addcmul_(c, s1)
        yield c, s


def epps_pulley(
    u_NS: Tensor, real_N: Tensor | None = None, points: int = POINTS, together: Together | None = None
) -> Tensor:
    """The statistic of each column of ``u`` against N(0, 1), [S]. Differentiable once.

    Args:
        u_NS: projections of N rows.
        real_N: bool, the rows that count; None: all.
        points: t values from 0 to `T_MAX`, at least 2.
        together: processes with N rows each whose statistic is that of all rows; then the mean of their gradients, as
            data-parallel training takes it, is the gradient of that statistic.
    """
    return EppsPulley.apply(u_NS, real_N, points, together)


def _sum(x_ND: Tensor, a_DS: Tensor, real_N: Tensor | None) -> Tensor:
    return epps_pulley(ops.matmul32(x_ND, a_DS), real_N).sum()
