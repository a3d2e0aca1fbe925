"""Normalisation of the targets, and the backward of LayerNorm as a transformer block on a CPU needs it.

Legend: D = levels * E channels.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vjepa_fast.ops import _backend, _check, _cpp, _triton

EPS = 1e-5
_MOST = 16384  # channels of a level that the Triton kernels hold in registers


def target_norm(h: Tensor, levels: int) -> Tensor:
    """LayerNorm without affine of each level's channels on its own (V-JEPA, arXiv:2404.08471; by level in V-JEPA 2.1).

    Args:
        h: [...,D], any floating dtype, the levels' channels side by side.
        levels: number of levels, a divisor of D.

    Returns:
        A new tensor of h's shape and dtype; statistics in promote_types(dtype, float32), eps 1e-5. Differentiable.

    Raises:
        ValueError: h is not floating, has no dimension, or D is no multiple of ``levels``.

    Floor: h read once, the result written once; backward reads h and its gradient once and writes one gradient.
    """
    _check.require(_check.positive(levels), "target_norm", "levels", "a positive int", levels)
    ok = h.is_floating_point() and h.dim() > 0 and h.shape[-1] > 0 and h.shape[-1] % levels == 0
    _check.require(ok, "target_norm", "h", f"a floating tensor [...,D] with D a multiple of levels={levels}", h)
    return _target_norm(h, levels)


def _centred(h: Tensor, levels: int) -> tuple[Tensor, Tensor]:
    x = h.to(torch.promote_types(h.dtype, torch.float32)).unflatten(-1, (levels, -1))
    x = x - x.mean(-1, keepdim=True)
    return x, (x.square().mean(-1, keepdim=True) + EPS).rsqrt()


@_backend.register("target_norm", "eager")
def _eager(h: Tensor, grad: Tensor | None, levels: int) -> Tensor:
    """The normalised h, or the gradient of h given that of the result."""
    x, rstd = _centred(h, levels)
    x.mul_(rstd)
    if grad is not None:
        g = grad.to(x.dtype).unflatten(-1, (levels, -1))
        x = rstd * (g - g.mean(-1, keepdim=True) - x * (g * x).mean(-1, keepdim=True))
    return x.flatten(-2).to(h.dtype).contiguous()


def _cpp_objections(*args: Any) -> list[str]:
    return _cpp.objections(*args[:1]) + (_cpp.dtype_objections(args[0]) if args else [])


@_backend.register("target_norm", "cpp", _cpp_objections)
def _cpp_norm(h: Tensor, grad: Tensor | None, levels: int) -> Tensor:
    out = torch.empty_like(h, memory_format=torch.contiguous_format)
    if grad is None:
        torch.ops.vjepa_fast_cpp.target_norm(h, levels, EPS, out)
    else:
        torch.ops.vjepa_fast_cpp.target_norm_backward(h, grad, levels, EPS, out)
    return out


def _triton_objections(*args: Any) -> list[str]:
    reasons = _triton.objections(*args[:1])
    if args and args[0].shape[-1] > _MOST * args[-1]:
        reasons.append(f"triton supports at most {_MOST} channels per level, not {args[0].shape[-1] // args[-1]}")
    return reasons


@_backend.register("target_norm", "triton", _triton_objections)
def _triton_norm(h: Tensor, grad: Tensor | None, levels: int) -> Tensor:
    out = torch.empty_like(h, memory_format=torch.contiguous_format)
    grad = None if grad is None else grad.contiguous()
    _triton.launch("norm", "target_norm", h, h.contiguous(), grad, levels, EPS, out)
    return out


@torch.library.custom_op("vjepa_fast::target_norm", mutates_args=())
def _target_norm(h: Tensor, levels: int) -> Tensor:
    return _backend.call("target_norm", h, None, levels)


@torch.library.custom_op("vjepa_fast::target_norm_backward", mutates_args=())
def _target_norm_backward(h: Tensor, grad: Tensor, levels: int) -> Tensor:
    return _backend.call("target_norm", h, grad, levels)


@_target_norm.register_fake
@_target_norm_backward.register_fake
def _(h: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(h, memory_format=torch.contiguous_format)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    h, ctx.levels = inputs
    ctx.save_for_backward(h)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
    return _target_norm_backward(*ctx.saved_tensors, grad, ctx.levels), None


_backend.register_gradient(_target_norm, _backward, _save)


# -- LayerNorm of a transformer block, in C++ and without autograd: for layers/cpu_block.py, where _cpp.LOADED
def layer_norm_again(x: Tensor, mean: Tensor, rstd: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """``F.layer_norm`` from the statistics of its forward: x [...,E], mean and rstd [...,1]; float32, contiguous."""
    out = torch.empty_like(x)
    torch.ops.vjepa_fast_cpp.norm_again(x, mean, rstd, weight, bias, out)
    return out


def layer_norm_backward(
    grad: Tensor, x: Tensor, mean: Tensor, rstd: Tensor, weight: Tensor, dx: Tensor
) -> tuple[Tensor, Tensor]:
    """Add the gradient of x to ``dx`` [...,E], and return those of weight and bias [E]; see ``layer_norm_again``."""
    dw, db = torch.empty_like(weight), torch.empty_like(weight)
    torch.ops.vjepa_fast_cpp.norm_backward(grad, x, mean, rstd, weight, dx, dw, db)
    return dw, db
