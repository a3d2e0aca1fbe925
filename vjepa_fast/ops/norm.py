"""Normalisation of the targets.

Legend: D = levels * E channels.
"""

from __future__ import annotations

import torch

from vjepa_fast.ops import _backend, _check, _cpp, _triton

EPS = 1e-5
_MOST = 16384  # channels of a level that the Triton kernels hold in registers


def target_norm(h: torch.Tensor, levels: int) -> torch.Tensor:
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
    _check.require(isinstance(levels, int) and levels > 0, "target_norm", "levels", "a positive int", levels)
    ok = h.is_floating_point() and h.dim() > 0 and h.shape[-1] > 0 and h.shape[-1] % levels == 0
    _check.require(ok, "target_norm", "h", f"a floating tensor [...,D] with D a multiple of levels={levels}", h)
    return _target_norm(h, levels)


def _centred(h: torch.Tensor, levels: int) -> tuple[torch.Tensor, torch.Tensor]:
    x = h.to(torch.promote_types(h.dtype, torch.float32)).unflatten(-1, (levels, -1))
    x = x - x.mean(-1, keepdim=True)
    return x, (x.square().mean(-1, keepdim=True) + EPS).rsqrt()


@_backend.register("target_norm", "eager")
def _eager(h: torch.Tensor, grad: torch.Tensor | None, levels: int) -> torch.Tensor:
    """The normalised h, or the gradient of h given that of the result."""
    x, rstd = _centred(h, levels)
    x.mul_(rstd)
    if grad is not None:
        g = grad.to(x.dtype).unflatten(-1, (levels, -1))
        x = rstd * (g - g.mean(-1, keepdim=True) - x * (g * x).mean(-1, keepdim=True))
    return x.flatten(-2).to(h.dtype).contiguous()


def _cpp_objections(*args) -> list[str]:
    reasons = _cpp.objections(*args[:1])
    if args and args[0].dtype not in (torch.float32, torch.bfloat16):
        reasons.append(f"cpp serves float32 and bfloat16, not {args[0].dtype}")
    return reasons


@_backend.register("target_norm", "cpp", _cpp_objections)
def _cpp_norm(h: torch.Tensor, grad: torch.Tensor | None, levels: int) -> torch.Tensor:
    out = torch.empty_like(h, memory_format=torch.contiguous_format)
    kernels = torch.ops.vjepa_fast_cpp
    if grad is None:
        kernels.target_norm(h, levels, EPS, out)
    else:
        kernels.target_norm_backward(h, grad, levels, EPS, out)
    return out


def _triton_objections(*args) -> list[str]:
    reasons = _triton.objections(*args[:1])
    if args and args[0].shape[-1] > _MOST * args[-1]:
        reasons.append(f"triton serves at most {_MOST} channels per level, not {args[0].shape[-1] // args[-1]}")
    return reasons


@_backend.register("target_norm", "triton", _triton_objections)
def _triton_norm(h: torch.Tensor, grad: torch.Tensor | None, levels: int) -> torch.Tensor:
    from vjepa_fast.kernels import norm as kernel

    out = torch.empty_like(h, memory_format=torch.contiguous_format)
    with _triton.device_of(h):
        kernel.target_norm(h.contiguous(), None if grad is None else grad.contiguous(), levels, EPS, out)
    return out


@torch.library.custom_op("vjepa_fast::target_norm", mutates_args=())
def _target_norm(h: torch.Tensor, levels: int) -> torch.Tensor:
    return _backend.call("target_norm", h, None, levels)


@torch.library.custom_op("vjepa_fast::target_norm_backward", mutates_args=())
def _target_norm_backward(h: torch.Tensor, grad: torch.Tensor, levels: int) -> torch.Tensor:
    return _backend.call("target_norm", h, grad, levels)


@_target_norm.register_fake
def _(h, levels):
    return torch.empty_like(h, memory_format=torch.contiguous_format)


@_target_norm_backward.register_fake
def _(h, grad, levels):
    return torch.empty_like(h, memory_format=torch.contiguous_format)


def _save(ctx, inputs, output):
    h, ctx.levels = inputs
    ctx.save_for_backward(h)


def _backward(ctx, grad):
    return _target_norm_backward(*ctx.saved_tensors, grad, ctx.levels), None


_target_norm.register_autograd(_backward, setup_context=_save)
