"""float32 products of the objectives, on a GPU by tensor cores without the loss of accuracy that TF32 has.

``linear32`` and ``matmul32`` take features in any dtype and weights in float32; ``cross_covariance`` is that of two
halves of the channels. On a CPU, in float64 and where Triton is not used they are PyTorch's. What the kernels do is in
kernels/product.py: their error is within twice that of a plain float32 product.

Legend: M rows, K inputs, N outputs; C rows of features, D channels, S groups of rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from vjepa_fast.ops import _backend, _check, _triton
from vjepa_fast.ops.linear import linear


def _computing(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _largest(x: Tensor) -> Tensor:
    """The largest absolute number of ``x``, float32 []."""
    return torch.linalg.vector_norm(x, float("inf"), dtype=torch.float32)


def _triton_objections(*args: Any) -> list[str]:
    tensors = [a for a in args if isinstance(a, Tensor)]
    reasons = _triton.objections(*tensors)
    if not reasons and (wrong := [t.dtype for t in tensors if t.is_floating_point() and t.dtype not in _triton.FLOATS]):
        reasons = [f"triton supports {_check.names(_triton.FLOATS)}, got {_check.names(wrong)}"]
    return reasons


# -- products ----------------------------------------------------------------------------------------------------------
def linear32(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """X W^T + b in promote_types(x, float32), differentiable.

    Args:
        x: [...,K], any floating dtype. bfloat16 and float16 cost two products of a tensor core, float32 three.
        weight: float32 [N,K] (float64 where x is); ``bias`` [N].

    Returns:
        [...,N].

    Raises:
        ValueError: a shape or dtype does not fit.

    Floor: x, weight and the result once each.
    """
    _check_product("linear32", x, weight, weight.shape[-1])
    return _backend.call("linear32", x, weight, bias)


def matmul32(x: Tensor, w: Tensor) -> Tensor:
    """X [...,K] times w [K,N], as `linear32` otherwise; w may have any strides."""
    _check_product("matmul32", x, w, w.shape[0])
    return _backend.call("matmul32", x, w)


def _check_product(op: str, x: Tensor, w: Tensor, inputs: int) -> None:
    ok = w.dim() == 2 and w.is_floating_point()
    _check.require(ok, op, "weight", "a floating tensor of two dimensions", w)
    ok = x.dim() > 0 and x.is_floating_point() and x.shape[-1] == inputs
    _check.require(ok, op, "x", f"a floating tensor [...,{inputs}]", x)


@_backend.register("linear32", "eager")
def _linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return linear(_computing(x), weight, bias)


@_backend.register("matmul32", "eager")
def _matmul(x: Tensor, w: Tensor) -> Tensor:
    return _computing(x) @ w


@_backend.register("linear32", "triton", _triton_objections)
def _linear_triton(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return _in_rows(x, weight.t(), bias)


@_backend.register("matmul32", "triton", _triton_objections)
def _matmul_triton(x: Tensor, w: Tensor) -> Tensor:
    return _in_rows(x, w, None)


def _in_rows(x: Tensor, w: Tensor, bias: Tensor | None) -> Tensor:
    if not x.numel() or not w.numel():
        return _computing(x) @ w if bias is None else _computing(x) @ w + bias
    rows = x.reshape(-1, x.shape[-1])
    with torch.no_grad():
        largest = _largest(rows), _largest(w)
    return _product(rows, w, bias, *largest).view(*x.shape[:-1], w.shape[1])


@_backend.define("product", "Tensor x, Tensor w, Tensor? bias, Tensor x_largest, Tensor w_largest")
def _product(x: Tensor, w: Tensor, bias: Tensor | None, x_largest: Tensor, w_largest: Tensor) -> Tensor:
    """Float32 [M,N]: x [M,K] w [K,N] + bias; ``largest``: absolute numbers, float32 []."""
    return _triton.launch("product", "product", x, x, w, bias, x_largest, w_largest)


@_product.register_fake
def _(x: Tensor, w: Tensor, *_: Any) -> Tensor:
    return x.new_empty((x.shape[0], w.shape[1]), dtype=torch.float32)


def _product_save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, w, bias, x_largest, w_largest = inputs
    ctx.bias = bias is not None
    ctx.save_for_backward(x, w, x_largest, w_largest)


def _product_grad(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, w, x_largest, w_largest = ctx.saved_tensors
    wants_x, wants_w, wants_bias = ctx.needs_input_grad[:3]
    largest = _largest(grad) if wants_x or wants_w else grad
    dx = _product(grad, w.t(), None, largest, w_largest).to(x.dtype) if wants_x else None
    dw = _product(x.t(), grad, None, x_largest, largest).to(w.dtype) if wants_w else None
    return dx, dw, grad.sum(0) if ctx.bias and wants_bias else None, None, None


_product.register_autograd(_product_grad, setup_context=_product_save)


# -- cross-covariance --------------------------------------------------------------------------------------------------
def cross_covariance(z: Tensor, offsets: Tensor | None, width: int, period: int) -> Sequence[Tensor]:
    """A^T Y of the centred channels of each group of rows, not yet divided by their number; differentiable.

    A are the first ``width`` of every ``period`` channels, Y the others.

    Args:
        z: [C,D], any floating dtype. Rows of no group may hold anything and get no gradient.
        offsets: int64 [S+1], where each group begins, and where the last one ends; None: one group of all rows.
        width, period: 0 < width < period, a divisor of D.

    Returns:
        S tensors [D_A,D_Y] in promote_types(z, float32).

    Raises:
        ValueError: a shape or dtype does not fit.

    Floor: z read once forward; read once and its gradient written once backward. The kernels read z for its means too.
    """
    op = "cross_covariance"
    _check.require(z.dim() == 2 and z.is_floating_point(), op, "z", "a floating tensor [C,D]", z)
    ok = _check.positive(period) and z.shape[1] % period == 0
    _check.require(ok, op, "period", f"a divisor of {z.shape[1]}", period)
    _check.require(_check.positive(width) and width < period, op, "width", f"from 1 to {period - 1}", width)
    ok = offsets is None or (offsets.dim() == 1 and offsets.dtype == torch.int64 and len(offsets) > 1)
    _check.require(ok, op, "offsets", "int64 [S+1]", offsets)
    return _backend.call("cross_covariance", z, offsets, width, period)


@_backend.register("cross_covariance", "eager")
def _covariance(z: Tensor, offsets: Tensor | None, width: int, period: int) -> list[Tensor]:
    """One product over all rows for each group, the others' being 0: their number is not known to the host."""
    z = _computing(z)
    if offsets is None:
        return [_sides(z - z.mean(0), width, period)]
    found: list[Tensor] = []
    row_C = torch.arange(len(z), device=z.device)
    for start, end in zip(offsets[:-1], offsets[1:]):
        own = ((row_C >= start) & (row_C < end))[:, None]
        x = torch.where(own, z, 0.0)
        found.append(_sides(torch.where(own, x - x.sum(0) / (end - start), 0.0), width, period))
    return found


def _sides(x: Tensor, width: int, period: int) -> Tensor:
    x = x.unflatten(-1, (-1, period))
    return x[..., :width].flatten(-2).t() @ x[..., width:].flatten(-2)


@_backend.register("cross_covariance", "triton", _triton_objections)
def _covariance_triton(z: Tensor, offsets: Tensor | None, width: int, period: int) -> Sequence[Tensor]:
    if offsets is None:
        offsets = torch.arange(2, device=z.device) * len(z)
    return _cross_covariance(z.contiguous(), offsets, width, period)[0].unbind(0)


_COVARIANCE = "Tensor z, Tensor offsets, SymInt width, SymInt period"


@_backend.define("cross_covariance", _COVARIANCE, "(Tensor, Tensor, Tensor)")
def _cross_covariance(z: Tensor, offsets: Tensor, width: int, period: int) -> tuple[Tensor, Tensor, Tensor]:
    """Float32 [S,D_A,D_Y]; and for the backward the means [S,D] and the largest absolute number []."""
    return _triton.launch("product", "covariance", z, z, offsets, width, period)


@_cross_covariance.register_fake
def _(z: Tensor, offsets: Tensor, width: int, period: int) -> tuple[Tensor, Tensor, Tensor]:
    d, groups = z.shape[1], len(offsets) - 1
    first = d // period * width
    shapes = (groups, first, d - first), (groups, d), ()
    product, mean, largest = (z.new_empty(shape, dtype=torch.float32) for shape in shapes)
    return product, mean, largest


@_backend.define("cross_covariance_backward", f"Tensor grad, {_COVARIANCE}, Tensor mean, Tensor largest")
def _cross_covariance_backward(
    grad: Tensor, z: Tensor, offsets: Tensor, width: int, period: int, mean: Tensor, largest: Tensor
) -> Tensor:
    """Dz [C,D] from grad [S,D_A,D_Y]."""
    numbers = mean, largest, _largest(grad), width, period
    return _triton.launch("product", "covariance_gradient", z, grad, z, offsets, *numbers)


@_cross_covariance_backward.register_fake
def _(grad: Tensor, z: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(z, memory_format=torch.contiguous_format)


def _covariance_save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    z, offsets, *ctx.window = inputs
    ctx.save_for_backward(z, offsets, *output[1:])
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)


def _covariance_grad(ctx: Any, grad: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    if grad is None:
        return None, None, None, None
    z, offsets, mean, largest = ctx.saved_tensors
    return _cross_covariance_backward(grad, z, offsets, *ctx.window, mean, largest), None, None, None


_cross_covariance.register_autograd(_covariance_grad, setup_context=_covariance_save)
