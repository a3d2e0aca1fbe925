"""The part of the latent losses that touches the features: functions of them, averaged over the channels of each token.

A loss term is one number per token (a *row*), then means and weights over rows, which are tiny. The ops here make the
rows; what a row's channels go through is a ``RowFunction`` that the term brings along, for PyTorch, Triton and C++.
Three access classes: TOKEN compares features with target rows, PAIR a token with the same place one time step later,
COLUMN all time steps of a place.

Legend: B batch, K tokens of a mask, N = T*H*W grid tokens, D = levels*E channels, S = H*W places, P columns, R calls.

``h`` may be handed over before its normalisation per level (``normalize=True``): it is then normalised as it is read.
The functions compute in promote_types(input, float32), rows are of that dtype, gradients of the dtype of ``z``.
``_latent_rows.py`` has the row functions and the eager code, ``_latent_kernels.py`` calls C++ and Triton.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from vjepa_fast.ops import _backend, _check
from vjepa_fast.ops import _latent_kernels as _latent_kernels  # registers the other backends
from vjepa_fast.ops._latent_powers import power_error
from vjepa_fast.ops._latent_rows import TARGETS, Column, Pair, RowCall, RowFunction, Token, function, functions

__all__ = [
    "RowCall",
    "RowFunction",
    "function",
    "functions",
    "latent_loss",
    "latent_loss_column",
    "latent_loss_pair",
    "latent_loss_token",
]


def _check_features(op: str, z: Tensor, h: Tensor, idx: Tensor | None, levels: int) -> None:
    _check.require(z.dim() == 3 and z.is_floating_point(), op, "z", "a floating tensor [B,K,D]", z)
    ok = h.dim() == 3 and h.is_floating_point() and h.shape[0] == z.shape[0] and h.shape[2] == z.shape[2]
    _check.require(ok, op, "h", f"a floating tensor [{z.shape[0]},N,{z.shape[2]}]", h)
    if idx is not None:
        _check.indices(op, "idx", idx, batch=z.shape[0])
        _check.require(idx.shape[1] == z.shape[1], op, "idx", f"{z.shape[1]} indices, one per row of z", idx)
    _check.require(h.device == z.device, op, "h", f"device {z.device}", h.device)
    _check.require(levels > 0 and z.shape[2] % levels == 0, op, "levels", f"a divisor of {z.shape[2]}", levels)


def _rows(z: Tensor, *shape: int) -> Tensor:
    return z.new_empty(shape, dtype=torch.promote_types(z.dtype, torch.float32))


def _gradient_like(grad: Tensor, z: Tensor, *rest: Any) -> Tensor:
    return torch.empty_like(z, memory_format=torch.contiguous_format)


def latent_loss(
    z: Tensor, h: Tensor, idx: Tensor, *, loss_exp: float = 1.0, levels: int = 1, normalize: bool = False
) -> Tensor:
    """Mean abs(z - h[idx])^p / p, the loss of a V-JEPA (arXiv:2404.08471, eq. 1), without gathering h.

    Args:
        z: [B,K,D], the predictor's output; receives gradient.
        h: [B,N,D], the target encoder's, without gradient.
        idx: int64 [B,K], the tokens of ``h`` that ``z`` predicts.
        loss_exp: p, at least 1.
        levels: groups of channels by which h is normalised.
        normalize: whether h is layer-normalised per level as it is read, or is so already.

    Returns:
        A scalar in promote_types(z dtype, float32).

    Raises:
        ValueError: a shape, dtype, exponent or (on the CPU) index does not fit.
    """
    _check.require(loss_exp >= 1, "latent_loss", "loss_exp", "a number of at least 1", loss_exp)
    return latent_loss_token(z, h, idx, power_error(loss_exp), levels=levels, normalize=normalize).mean()


# -- TOKEN ------------------------------------------------------------------------------------------------------------
def latent_loss_token(
    z: Tensor,
    h: Tensor,
    idx: Tensor,
    call: RowCall,
    *,
    target: str = "same",
    after: Tensor | None = None,
    places: int = 0,
    levels: int = 1,
    normalize: bool = False,
) -> Tensor:
    """One function of features and target rows, averaged over the channels of each token.

    Floor: z and the gathered rows of h are read once; with gradient, one byte per channel is written (slopes of L1) and
    the backward reads it and writes dz.

    Args:
        z: [B,K,D]; receives gradient. Other than for a ``sign`` function it is kept for the backward.
        h: [B,N,D], without gradient.
        idx: int64 [B,K], the tokens of ``h`` that belong to the rows of ``z``.
        call: the function, from a ``RowFunction`` of access TOKEN.
        target: "same" h[idx]; "next" h[idx+places]; "step" h[idx+places] - h[idx].
        after: int64 [B,K]; where negative the row is 0 and nothing is read. None: every row counts.
        places: S, tokens per time step, for "next" and "step".
        levels: groups of channels by which h is normalised.
        normalize: whether h is normalised per level as it is read, or is so already.

    Returns:
        [B,K] in promote_types(z dtype, float32).

    Raises:
        ValueError: a shape, dtype or (on the CPU) index does not fit.
    """
    op = "latent_loss_token"
    _check_features(op, z, h, idx, levels)
    _check.require(target in TARGETS, op, "target", f"one of {', '.join(TARGETS)}", target)
    keep = z.requires_grad and torch.is_grad_enabled()
    where = TARGETS.index(target), places, levels
    return _token(z, h.detach(), idx, after, call.key, call.numbers(z.shape[2]), *where, normalize, keep)[0]


_TOKEN = (
    "Tensor z, Tensor h, Tensor idx, Tensor? after, str key, float[] numbers, "
    "SymInt target, SymInt places, SymInt levels, bool normalize"
)


@_backend.define("latent_loss_token", f"{_TOKEN}, bool keep", "(Tensor, Tensor)")
def _token(*args: Any) -> tuple[Tensor, Tensor]:
    a = Token(*args[:-1])
    _check.in_range("latent_loss_token", "idx", a.idx, a.h.shape[1])
    return _backend.call("latent_loss_token", a, args[-1])


@_token.register_fake
def _(z: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    keep = args[-1] and function(args[3]).sign
    return _rows(z, *z.shape[:2]), z.new_empty(z.shape if keep else (0,), dtype=torch.int8)


@torch.library.custom_op("vjepa_fast::latent_loss_token_sign", mutates_args=())
def _token_sign(grad: Tensor, sign: Tensor, dtype: torch.dtype) -> Tensor:
    """Dz [B,K,D] = slopes [B,K,D] (int8) x grad [B,K] / D."""
    return _backend.call("latent_loss_token_sign", grad, sign, dtype)


@_token_sign.register_fake
def _(grad: Tensor, sign: Tensor, dtype: torch.dtype) -> Tensor:
    return sign.new_empty(sign.shape, dtype=dtype)


@_backend.define("latent_loss_token_backward", f"Tensor grad, {_TOKEN}")
def _token_backward(grad: Tensor, *args: Any) -> Tensor:
    """Dz [B,K,D] from grad [B,K], slopes computed again."""
    return _backend.call("latent_loss_token_backward", grad, Token(*args))


_token_backward.register_fake(_gradient_like)


def _token_save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    z, h, idx, after, *ctx.rest, _ = inputs
    ctx.sign, ctx.dtype = function(ctx.rest[0]).sign, z.dtype
    ctx.save_for_backward(*((output[1],) if ctx.sign else (z, h, idx, after)))
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)  # or the slopes get a gradient of zeros, as large as z


def _token_grad(ctx: Any, grad: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
    if grad is None:
        return (None,) * 11
    if ctx.sign:
        dz = _token_sign(grad, *ctx.saved_tensors, ctx.dtype)
    else:
        dz = _token_backward(grad, *ctx.saved_tensors, *ctx.rest)
    return dz, *[None] * 10


_backend.register_gradient(_token, _token_grad, _token_save)


# -- PAIR -------------------------------------------------------------------------------------------------------------
def latent_loss_pair(
    z: Tensor,
    h: Tensor,
    idx: Tensor,
    after: Tensor,
    before: Tensor,
    row_calls: Sequence[RowCall],
    *,
    places: int,
    levels: int = 1,
    normalize: bool = False,
) -> Tensor:
    """Functions of (z, h) at a token and one time step later, averaged over channels; all of them in one pass.

    Floor: z and the gathered rows of h are read once forward; the backward reads them again and writes dz.

    Args:
        z, h, idx, levels, normalize: as for ``latent_loss_token``.
        after: int64 [B,K], the row of ``z`` at the same place one time step later; -1 where there is none, and the row
            is 0.
        before: int64 [B,K], likewise one time step earlier.
        row_calls: the functions, of access PAIR.
        places: S, tokens per time step of ``h``.

    Returns:
        [R,B,K] in promote_types(z dtype, float32).

    Raises:
        ValueError: a shape, dtype or (on the CPU) index does not fit.
    """
    op = "latent_loss_pair"
    _check_features(op, z, h, idx, levels)
    for name, x in (("after", after), ("before", before)):
        _check.indices(op, name, x, batch=z.shape[0])
        _check.require(x.shape == idx.shape, op, name, f"shape {list(idx.shape)}", x)
    keys, numbers = _flat(row_calls, z.shape[2])
    return _pair(z, h.detach(), idx, after, before, keys, numbers, places, levels, normalize)


def _flat(row_calls: Sequence[RowCall], dim: int) -> tuple[str, list[float]]:
    return ",".join(c.key for c in row_calls), [x for c in row_calls for x in c.numbers(dim)]


_PAIR = (
    "Tensor z, Tensor h, Tensor idx, Tensor after, Tensor before, str keys, float[] numbers, "
    "SymInt places, SymInt levels, bool normalize"
)


@_backend.define("latent_loss_pair", _PAIR)
def _pair(*args: Any) -> Tensor:
    a = Pair(*args)
    _check.in_range("latent_loss_pair", "idx", a.idx, a.h.shape[1])
    for name, x in (("after", a.after), ("before", a.before)):
        _check.in_range("latent_loss_pair", name, x, a.z.shape[1], least=-1)
    return _backend.call("latent_loss_pair", a)


@_pair.register_fake
def _(z: Tensor, *args: Any) -> Tensor:
    return _rows(z, len(args[5]) // 4, *z.shape[:2])


@_backend.define("latent_loss_pair_backward", f"Tensor grad, {_PAIR}")
def _pair_backward(grad: Tensor, *args: Any) -> Tensor:
    """Dz [B,K,D] from grad [R,B,K]; every row gathers from its own pair and from the one before it."""
    return _backend.call("latent_loss_pair_backward", grad, Pair(*args))


_pair_backward.register_fake(_gradient_like)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    tensors, ctx.rest = inputs[:5], inputs[5:]
    ctx.save_for_backward(*tensors)


def _pair_grad(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    return _pair_backward(grad, *ctx.saved_tensors, *ctx.rest), *[None] * 9


_backend.register_gradient(_pair, _pair_grad, _save)


# -- COLUMN -----------------------------------------------------------------------------------------------------------
def latent_loss_column(
    z: Tensor,
    h: Tensor,
    slots: Tensor,
    tokens: Tensor,
    call: RowCall,
    constants: Tensor,
    *,
    levels: int = 1,
    normalize: bool = False,
) -> Tensor:
    """One function of all time steps of a place, averaged over channels.

    Floor: the columns of z and h are read once forward; the backward reads them again and writes dz (0 elsewhere).

    Args:
        z, h, levels, normalize: as for ``latent_loss_token``.
        slots: int64 [B,P,T], the rows of ``z`` at one place, by time; no row in two columns. A negative first entry
            means that there is no such column.
        tokens: int64 [B,P,T], the same as tokens of ``h``.
        call: the function, from a ``RowFunction`` of access COLUMN.
        constants: float [C,T], handed to the function.

    Returns:
        [B,P] in promote_types(z dtype, float32), 0 where there is no column.

    Raises:
        ValueError: a shape, dtype or (on the CPU) index does not fit.
    """
    op = "latent_loss_column"
    _check_features(op, z, h, None, levels)
    for name, x in (("slots", slots), ("tokens", tokens)):
        ok = x.dim() == 3 and x.dtype == torch.int64 and x.shape == slots.shape and x.shape[0] == z.shape[0]
        _check.require(ok, op, name, f"int64 [{z.shape[0]},P,T]", x)
    ok = constants.dim() == 2 and constants.shape[1] == slots.shape[2]
    _check.require(ok, op, "constants", f"[C,{slots.shape[2]}]", constants)
    return _column(z, h.detach(), slots, tokens, constants, call.key, levels, normalize)


_COLUMN = "Tensor z, Tensor h, Tensor slots, Tensor tokens, Tensor constants, str key, SymInt levels, bool normalize"


@_backend.define("latent_loss_column", _COLUMN)
def _column(*args: Any) -> Tensor:
    a = Column(*args)
    _check.in_range("latent_loss_column", "slots", a.slots, a.z.shape[1], least=-1)
    _check.in_range("latent_loss_column", "tokens", a.tokens, a.h.shape[1], least=-1)
    return _backend.call("latent_loss_column", a)


@_column.register_fake
def _(z: Tensor, h: Tensor, slots: Tensor, *args: Any) -> Tensor:
    return _rows(z, *slots.shape[:2])


@_backend.define("latent_loss_column_backward", f"Tensor grad, {_COLUMN}")
def _column_backward(grad: Tensor, *args: Any) -> Tensor:
    """Dz [B,K,D] from grad [B,P]."""
    return _backend.call("latent_loss_column_backward", grad, Column(*args))


_column_backward.register_fake(_gradient_like)


def _column_grad(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    return _column_backward(grad, *ctx.saved_tensors, *ctx.rest), *[None] * 7


_backend.register_gradient(_column, _column_grad, _save)
