"""The Epps-Pulley statistic along random directions: how far rows are from an isotropic Gaussian (SIGReg of LeJEPA,
arXiv:2511.08544).

N rows, S directions. Of projections u [N] on one direction, with t = linspace(0, 3, points), the statistic is
N sum_t w_t [(mean cos(t u) - exp(-t^2/2))^2 + (mean sin(t u))^2], w = trapezoid weights (dt at both ends, 2 dt inside:
the integral over [-3, 3]) x exp(-t^2/2).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

POINTS, T_MAX = 17, 3.0


class Together(Protocol):
    """Processes that compute one loss together."""

    world: int

    def mean(self, values: Tensor) -> Tensor:
        """Mean over the processes."""
        ...


def draw(dim: int, num_slices: int, *, seed: int, step: int, device: torch.device) -> Tensor:
    """Normal numbers [dim, num_slices], float32: a function of (seed, step) and the kind of device."""
    generator = torch.Generator(device).manual_seed((seed * 1_000_003 + step) % (1 << 62))
    return torch.randn(dim, num_slices, generator=generator, device=device, dtype=torch.float32)


def directions(normal_DS: Tensor) -> Tensor:
    """Unit columns [D, S] from normal numbers."""
    return normal_DS / torch.linalg.vector_norm(normal_DS, dim=0, keepdim=True)


class _EppsPulley(torch.autograd.Function):
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
    return _EppsPulley.apply(u_NS, real_N, points, together)
