"""Normalisation of the targets.

Legend: D = levels * E channels.
"""
from __future__ import annotations

import torch

from vjepa_fast.ops import _backend, _check

EPS = 1e-5


def target_norm(h: torch.Tensor, levels: int) -> torch.Tensor:
    """LayerNorm without affine of each level's channels on its own (V-JEPA, arXiv:2404.08471; by level in V-JEPA 2.1).

    Args:
        h: [...,D], any floating dtype, the levels' channels side by side.
        levels: number of levels, a divisor of D.
    Returns:
        A new tensor of h's shape and dtype; statistics in promote_types(dtype, float32), eps 1e-5. Differentiable.
    Raises:
        ValueError: h is not floating, has no dimension, or D is no multiple of ``levels``.
    """
    _check.require(isinstance(levels, int) and levels > 0, "target_norm", "levels", "a positive int", levels)
    ok = h.is_floating_point() and h.dim() > 0 and h.shape[-1] > 0 and h.shape[-1] % levels == 0
    _check.require(ok, "target_norm", "h", f"a floating tensor [...,D] with D a multiple of levels={levels}", h)
    return _target_norm(h, levels)


def _centred(h: torch.Tensor, levels: int) -> tuple[torch.Tensor, torch.Tensor]:
    x = h.to(torch.promote_types(h.dtype, torch.float32)).unflatten(-1, (levels, -1))
    x = x - x.mean(-1, keepdim=True)
    return x, (x.square().mean(-1, keepdim=True) + EPS).rsqrt()


@_backend.register("target_norm", "eager")
def _eager(h: torch.Tensor, levels: int) -> torch.Tensor:
    x, rstd = _centred(h, levels)
    return x.mul_(rstd).flatten(-2).to(h.dtype).contiguous()


@torch.library.custom_op("vjepa_fast::target_norm", mutates_args=())
def _target_norm(h: torch.Tensor, levels: int) -> torch.Tensor:
    return _backend.call("target_norm", h, levels)


@_target_norm.register_fake
def _(h, levels):
    return torch.empty_like(h, memory_format=torch.contiguous_format)


def _save(ctx, inputs, output):
    h, ctx.levels = inputs
    ctx.save_for_backward(h)


def _backward(ctx, grad):
    (h,) = ctx.saved_tensors
    x, rstd = _centred(h, ctx.levels)
    x = x * rstd
    g = grad.to(x.dtype).unflatten(-1, (ctx.levels, -1))
    g = rstd * (g - g.mean(-1, keepdim=True) - x * (g * x).mean(-1, keepdim=True))
    return g.flatten(-2).to(h.dtype), None


_target_norm.register_autograd(_backward, setup_context=_save)
