"""Residual addition, LayerNorm and cast in one pass, for a transformer block on a GPU (layers/fused_block.py).

These have no autograd of their own: the block's node calls forward and backward. Legend: n rows of E channels.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vjepa_fast.ops import _backend, _triton

_MOST = 8192  # channels that the Triton kernels hold in registers


def add_norm(
    x: Tensor, y: Tensor | None, shift: Tensor | None, weight: Tensor, bias: Tensor, eps: float, out: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """``x + y + shift``, and its LayerNorm in ``out``.

    Args:
        x: [n,E], contiguous: the residual stream.
        y: [n,E] of x's dtype, contiguous: what is added to it; None: nothing, and no shift.
        shift: [E], the bias of the layer that made y; None: 0.
        weight: [E], of the LayerNorm, any floating dtype, as ``shift`` and ``bias``.
        bias: [E].
        eps: added to the variance.
        out: [n,E], the dtype of the result; its rows may lie apart (one level of several side by side).

    Returns:
        The sum [n,E], rounded to x's dtype, which is what is normalised (without y: an empty tensor, the sum being x),
        and mean and reciprocal deviation of its rows, [n] in promote_types(dtype, float32).
    """
    return _add_norm(x, y, shift, weight, bias, eps, out)


def add_norm_backward(
    grad: Tensor, total: Tensor, rest: Tensor | None, weight: Tensor, bias: Tensor | None, mean: Tensor, rstd: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of ``add_norm``, all from one read of what it kept.

    Args:
        grad: [n,E], of its normalised output; rows may lie apart.
        total: [n,E], contiguous, the sum.
        rest: [n,E], the gradient that reaches the sum otherwise; None: 0.
        weight: [E].
        bias: [E]; None: the output is not wanted again.
        mean: [n], as returned.
        rstd: [n], as returned.

    Returns:
        The gradient of x, which is that of y too, [n,E] of the sum's dtype; the normalised output again, [n,E] of the
        dtype of ``grad`` (empty without ``bias``); and [3,E] of mean's dtype, the gradients of weight, bias and shift.
    """
    return _add_norm_backward(grad, total, rest, weight, bias, mean, rstd)


@_backend.register("add_norm", "eager")
def _eager(
    x: Tensor, y: Tensor | None, shift: Tensor | None, weight: Tensor, bias: Tensor, eps: float, out: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    wide = torch.promote_types(x.dtype, torch.float32)
    total = x.new_empty(0)
    if y is not None:
        total = x = (x.to(wide) + y + (0 if shift is None else shift)).to(x.dtype)
    centred = x.to(wide)
    mean = centred.mean(-1)
    centred = centred - mean[:, None]
    rstd = (centred.square().mean(-1) + eps).rsqrt()
    out.copy_(centred * rstd[:, None] * weight + bias)
    return total, mean, rstd


@_backend.register("add_norm_backward", "eager")
def _eager_backward(
    grad: Tensor, total: Tensor, rest: Tensor | None, weight: Tensor, bias: Tensor | None, mean: Tensor, rstd: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    x = (total.to(mean.dtype) - mean[:, None]) * rstd[:, None]
    g = grad.to(mean.dtype)
    sums = [(g * x).sum(0), g.sum(0)]
    g = g * weight
    dx = rstd[:, None] * (g - g.mean(-1, keepdim=True) - x * (g * x).mean(-1, keepdim=True))
    if rest is not None:
        dx = dx + rest
    again = grad.new_empty(0) if bias is None else (x * weight + bias).to(grad.dtype)
    return dx.to(total.dtype), again, torch.stack([*sums, dx.sum(0)])


def _objections(*args: Any) -> list[str]:
    reasons = _triton.objections(*args[:2])
    if args and args[0].shape[-1] > _MOST:
        reasons.append(f"triton supports at most {_MOST} channels, not {args[0].shape[-1]}")
    return reasons


@_backend.register("add_norm", "triton", _objections)
def _kernel(
    x: Tensor, y: Tensor | None, shift: Tensor | None, weight: Tensor, bias: Tensor, eps: float, out: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    total = x.new_empty(0) if y is None else torch.empty_like(x)
    mean, rstd = (x.new_empty(len(x), dtype=torch.float32) for _ in range(2))
    into = None if y is None else total
    _triton.launch("add_norm", "add_norm", x, x, y, shift, weight, bias, eps, into, out, mean, rstd)
    return total, mean, rstd


@_backend.register("add_norm_backward", "triton", _objections)
def _kernel_backward(
    grad: Tensor, total: Tensor, rest: Tensor | None, weight: Tensor, bias: Tensor | None, mean: Tensor, rstd: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    rows, channels = total.shape
    grad = grad if grad.stride(-1) == 1 else grad.contiguous()
    rest = None if rest is None else rest.contiguous()
    dx = torch.empty_like(total)
    again = None if bias is None else grad.new_empty(rows, channels)
    programs = _triton.launch("add_norm", "programs", total, rows, channels, _triton.processors(total.device))
    partial = mean.new_empty(programs, 3, channels)
    _triton.launch(
        "add_norm", "add_norm_backward", total, grad, total, rest, weight, bias, mean, rstd, dx, again, partial
    )
    return dx, grad.new_empty(0) if again is None else again, partial.sum(0)


@torch.library.custom_op("vjepa_fast::add_norm", mutates_args=("out",))
def _add_norm(
    x: Tensor, y: Tensor | None, shift: Tensor | None, weight: Tensor, bias: Tensor, eps: float, out: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    return _backend.call("add_norm", x, y, shift, weight, bias, eps, out)


@torch.library.custom_op("vjepa_fast::add_norm_backward", mutates_args=())
def _add_norm_backward(
    grad: Tensor, total: Tensor, rest: Tensor | None, weight: Tensor, bias: Tensor | None, mean: Tensor, rstd: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    return _backend.call("add_norm_backward", grad, total, rest, weight, bias, mean, rstd)


@_add_norm.register_fake
def _(x: Tensor, y: Tensor | None, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    stats = [x.new_empty(x.shape[0], dtype=torch.promote_types(x.dtype, torch.float32)) for _ in range(2)]
    return x.new_empty(0) if y is None else torch.empty_like(x), stats[0], stats[1]


@_add_norm_backward.register_fake
def _(
    grad: Tensor, total: Tensor, rest: Tensor | None, weight: Tensor, bias: Tensor | None, mean: Tensor, rstd: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    again = grad.new_empty(0 if bias is None else grad.shape)
    return torch.empty_like(total), again, mean.new_empty(3, total.shape[1])
