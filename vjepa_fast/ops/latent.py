"""The part of the latent losses that touches the features: functions of them, averaged over the channels of each token.

A loss term is one number per token (a *row*), then means and weights over rows, which are tiny. The ops here make the
rows; what a row's channels go through is a ``RowFunction`` that the term brings along, for PyTorch, Triton and C++.
Three access classes: TOKEN compares features with target rows, PAIR a token with the same place one time step later,
COLUMN all time steps of a place.

Legend: B batch, K tokens of a mask, N = T*H*W grid tokens, D = levels*E channels, S = H*W places, P columns, R calls.

``h`` may be handed over before its normalisation per level (``normalize=True``): it is then normalised as it is read.
The functions compute in promote_types(input, float32), rows are of that dtype, gradients of the dtype of ``z``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vjepa_fast.ops import _backend, _check
from vjepa_fast.ops.norm import EPS

TARGETS = ("same", "next", "step")  # h at the token, one time step later, and the difference of the two


@dataclass(frozen=True)
class RowFunction:
    """A function of features, channel by channel, with its slopes.

    Attributes:
        key: its name in the ops' schemas; one function per key.
        access: TOKEN ``(x, y, p) -> value, d/dx``; PAIR ``(z0, z1, h0, h1, p) -> value, d/dz0, d/dz1``;
            COLUMN ``(z, h, constants) -> value, d/dz`` of tensors [B,T,P,D].
        formula: in PyTorch, elementwise (COLUMN: over T as well).
        device: makes the ``@triton.jit`` function of the same signature; called once, only where Triton is there.
            COLUMN receives blocks [T,channels], a pointer to the constants, their number of rows, and T.
        cpp: its number in csrc/latent.cpp; None: eager code serves on the CPU.
        sign: the slope is -1, 0 or 1, so the forward keeps it in one byte per channel instead of the features.
        reads: which of z, h it looks at.
    """

    key: str
    access: str
    formula: Callable[..., tuple[Tensor, ...]]
    device: Callable[[], Any] | None = None
    cpp: int | None = None
    sign: bool = False
    reads: str = "zh"

    @property
    def everywhere(self) -> bool:
        """Whether every kind of kernel has it; others run in a pass of their own."""
        return self.device is not None and self.cpp is not None

    def __call__(self, p: float = 0.0, window: tuple[int, int, int] | None = None) -> RowCall:
        """The function with its parameter and channels; see ``RowCall``."""
        known = _functions.setdefault(self.key, self)
        if known != self and known.formula.__qualname__ != self.formula.__qualname__:
            raise ValueError(f"row function {self.key!r} is defined twice")
        return RowCall(self.key, float(p), window)


@dataclass(frozen=True)
class RowCall:
    """``p``: parameter. ``window`` (low, high, period): channels c with low <= c % period < high; None means all."""

    key: str
    p: float = 0.0
    window: tuple[int, int, int] | None = None

    def numbers(self, dim: int) -> list[float]:
        low, high, period = self.window or (0, dim, dim)
        return [self.p, float(low), float(high), float(period)]


_functions: dict[str, RowFunction] = {}


def function(key: str) -> RowFunction:
    return _functions[key]


def functions() -> tuple[str, ...]:
    """Keys of all row functions that were called so far."""
    return tuple(_functions)


def calls(keys: str, numbers: Sequence[float]) -> list[tuple[RowFunction, float, tuple[int, int, int]]]:
    """(function, p, window) of each call, from the flat form that an op's schema has."""
    rows = [numbers[n : n + 4] for n in range(0, len(numbers), 4)]
    return [(_functions[k], p, (int(a), int(b), int(c))) for k, (p, a, b, c) in zip(keys.split(","), rows)]


# -- what the eager code shares ----------------------------------------------------------------------------------------
def _computing(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _take(x_BND: Tensor, idx_BK: Tensor) -> Tensor:
    b, n, d = x_BND.shape
    start = torch.arange(b, device=x_BND.device)[:, None] * n
    return x_BND.reshape(b * n, d).index_select(0, (idx_BK + start).reshape(-1)).view(*idx_BK.shape, d)


def _target_rows(h: Tensor, idx: Tensor, levels: int, normalize: bool) -> Tensor:
    rows = _computing(_take(h, idx.clamp(0, h.shape[1] - 1)))
    if normalize:
        rows = rows.unflatten(-1, (levels, -1))
        rows = rows - rows.mean(-1, keepdim=True)
        rows = (rows * (rows.square().mean(-1, keepdim=True) + EPS).rsqrt()).flatten(-2)
    return rows


def _window_mask(window: tuple[int, int, int], dim: int, like: Tensor) -> tuple[Tensor | None, int]:
    low, high, period = window
    if (low, high) == (0, period):
        return None, dim
    inside = torch.arange(dim, device=like.device) % period
    mask = (inside >= low) & (inside < high)
    return mask.to(like.dtype), (high - low) * (dim // period)


def _check_features(op: str, z: Tensor, h: Tensor, idx: Tensor | None, levels: int) -> None:
    _check.require(z.dim() == 3 and z.is_floating_point(), op, "z", "a floating tensor [B,K,D]", z)
    ok = h.dim() == 3 and h.is_floating_point() and h.shape[0] == z.shape[0] and h.shape[2] == z.shape[2]
    _check.require(ok, op, "h", f"a floating tensor [{z.shape[0]},N,{z.shape[2]}]", h)
    if idx is not None:
        _check.indices(op, "idx", idx, batch=z.shape[0])
        _check.require(idx.shape[1] == z.shape[1], op, "idx", f"{z.shape[1]} indices, one per row of z", idx)
    _check.require(h.device == z.device, op, "h", f"device {z.device}", h.device)
    _check.require(levels > 0 and z.shape[2] % levels == 0, op, "levels", f"a divisor of {z.shape[2]}", levels)


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
        levels, normalize: h is normalised per level as it is read.

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


@torch.library.custom_op("vjepa_fast::latent_loss_token", mutates_args=())
def _token(
    z: Tensor,
    h: Tensor,
    idx: Tensor,
    after: Tensor | None,
    key: str,
    numbers: Sequence[float],
    target: int,
    places: int,
    levels: int,
    normalize: bool,
    keep: bool,
) -> tuple[Tensor, Tensor]:
    _check.in_range("latent_loss_token", "idx", idx, h.shape[1])
    return _backend.call("latent_loss_token", z, h, idx, after, key, numbers, target, places, levels, normalize, keep)


@_token.register_fake
def _(z, h, idx, after, key, numbers, target, places, levels, normalize, keep):
    sign = z.new_empty(z.shape if keep and _functions[key].sign else (0,), dtype=torch.int8)
    return z.new_empty(z.shape[:2], dtype=torch.promote_types(z.dtype, torch.float32)), sign


def _token_terms(z, h, idx, after, key, numbers, target, places, levels, normalize):
    y = _target_rows(h, idx if target == 0 else idx + places, levels, normalize)
    if TARGETS[target] == "step":
        y = y - _target_rows(h, idx, levels, normalize)
    ((fn, p, _),) = calls(key, numbers)
    value, slope = fn.formula(_computing(z), y, p)
    if after is not None:
        dead = (after < 0)[..., None]
        value, slope = value.masked_fill(dead, 0.0), slope.masked_fill(dead, 0.0)
    return value, slope


@_backend.register("latent_loss_token", "eager")
def _token_eager(z, h, idx, after, key, numbers, target, places, levels, normalize, keep):
    value, slope = _token_terms(z, h, idx, after, key, numbers, target, places, levels, normalize)
    sign = slope.to(torch.int8) if keep and _functions[key].sign else z.new_empty(0, dtype=torch.int8)
    return value.mean(-1), sign


@torch.library.custom_op("vjepa_fast::latent_loss_token_sign", mutates_args=())
def _token_sign(grad: Tensor, sign: Tensor, dtype: torch.dtype) -> Tensor:
    """Dz [B,K,D] = slopes [B,K,D] (int8) x grad [B,K] / D."""
    return _backend.call("latent_loss_token_sign", grad, sign, dtype)


@_token_sign.register_fake
def _(grad, sign, dtype):
    return sign.new_empty(sign.shape, dtype=dtype)


@_backend.register("latent_loss_token_sign", "eager")
def _token_sign_eager(grad, sign, dtype):
    return (sign.to(grad.dtype) * (grad / sign.shape[-1])[..., None]).to(dtype)


@torch.library.custom_op("vjepa_fast::latent_loss_token_backward", mutates_args=())
def _token_backward(
    grad: Tensor,
    z: Tensor,
    h: Tensor,
    idx: Tensor,
    after: Tensor | None,
    key: str,
    numbers: Sequence[float],
    target: int,
    places: int,
    levels: int,
    normalize: bool,
) -> Tensor:
    """Dz [B,K,D] from grad [B,K], slopes computed again."""
    return _backend.call(
        "latent_loss_token_backward", grad, z, h, idx, after, key, numbers, target, places, levels, normalize
    )


@_token_backward.register_fake
def _(grad, z, h, idx, after, key, numbers, target, places, levels, normalize):
    return torch.empty_like(z, memory_format=torch.contiguous_format)


@_backend.register("latent_loss_token_backward", "eager")
def _token_backward_eager(grad, z, h, idx, after, key, numbers, target, places, levels, normalize):
    slope = _token_terms(z, h, idx, after, key, numbers, target, places, levels, normalize)[1]
    return (slope * (grad / z.shape[-1])[..., None]).to(z.dtype)


def _token_save(ctx, inputs, output):
    z, h, idx, after, *ctx.rest, keep = inputs
    ctx.sign, ctx.dtype = _functions[ctx.rest[0]].sign, z.dtype
    ctx.save_for_backward(*((output[1],) if ctx.sign else (z, h, idx, after)))
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)  # or the slopes get a gradient of zeros, as large as z


def _token_grad(ctx, grad, _):
    if grad is None:
        return (None,) * 11
    if ctx.sign:
        dz = _token_sign(grad, *ctx.saved_tensors, ctx.dtype)
    else:
        dz = _token_backward(grad, *ctx.saved_tensors, *ctx.rest)
    return dz, *[None] * 10


_token.register_autograd(_token_grad, setup_context=_token_save)


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
        z: [B,K,D]; receives gradient.
        h: [B,N,D], without gradient.
        idx: int64 [B,K], token of each row of ``z``.
        after, before: int64 [B,K], the row of ``z`` at the same place one time step later / earlier; -1 where there is
            none. Rows without a later one are 0.
        row_calls: the functions, of access PAIR.
        places: S, tokens per time step of ``h``.
        levels, normalize: h is normalised per level as it is read.

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


@torch.library.custom_op("vjepa_fast::latent_loss_pair", mutates_args=())
def _pair(
    z: Tensor,
    h: Tensor,
    idx: Tensor,
    after: Tensor,
    before: Tensor,
    keys: str,
    numbers: Sequence[float],
    places: int,
    levels: int,
    normalize: bool,
) -> Tensor:
    _check.in_range("latent_loss_pair", "idx", idx, h.shape[1])
    for name, x in (("after", after), ("before", before)):
        _check.in_range("latent_loss_pair", name, x, z.shape[1], least=-1)
    return _backend.call("latent_loss_pair", z, h, idx, after, before, keys, numbers, places, levels, normalize)


@_pair.register_fake
def _(z, h, idx, after, before, keys, numbers, places, levels, normalize):
    return z.new_empty((len(numbers) // 4, *z.shape[:2]), dtype=torch.promote_types(z.dtype, torch.float32))


def _pair_terms(z, h, idx, after, keys, numbers, places, levels, normalize):
    """Per call: (value, d/dz0, d/dz1), each [B,K,D], 0 outside pairs and window; and the channel count."""
    z0 = _computing(z)
    z1 = _take(z0, after.clamp(min=0))
    h0, h1 = (_target_rows(h, i, levels, normalize) for i in (idx, idx + places))
    for fn, p, window in calls(keys, numbers):
        mask, count = _window_mask(window, z.shape[2], z0)
        parts = [x.masked_fill((after < 0)[..., None], 0.0) for x in fn.formula(z0, z1, h0, h1, p)]
        yield [x if mask is None else x * mask for x in parts], count


@_backend.register("latent_loss_pair", "eager")
def _pair_eager(z, h, idx, after, before, keys, numbers, places, levels, normalize):
    terms = _pair_terms(z, h, idx, after, keys, numbers, places, levels, normalize)
    return torch.stack([parts[0].sum(-1) / count for parts, count in terms])


@torch.library.custom_op("vjepa_fast::latent_loss_pair_backward", mutates_args=())
def _pair_backward(
    grad: Tensor,
    z: Tensor,
    h: Tensor,
    idx: Tensor,
    after: Tensor,
    before: Tensor,
    keys: str,
    numbers: Sequence[float],
    places: int,
    levels: int,
    normalize: bool,
) -> Tensor:
    """Dz [B,K,D] from grad [R,B,K]; every row gathers from its own pair and from the one before it."""
    return _backend.call(
        "latent_loss_pair_backward", grad, z, h, idx, after, before, keys, numbers, places, levels, normalize
    )


@_pair_backward.register_fake
def _(grad, z, h, idx, after, before, keys, numbers, places, levels, normalize):
    return torch.empty_like(z, memory_format=torch.contiguous_format)


@_backend.register("latent_loss_pair_backward", "eager")
def _pair_backward_eager(grad, z, h, idx, after, before, keys, numbers, places, levels, normalize):
    dz = torch.zeros_like(z, dtype=torch.promote_types(z.dtype, torch.float32))
    terms = _pair_terms(z, h, idx, after, keys, numbers, places, levels, normalize)
    for g_BK, ((_, to_0, to_1), count) in zip(grad, terms):
        g = (g_BK / count)[..., None]
        dz += g * to_0
        dz += _take(g * to_1, before.clamp(min=0)).masked_fill((before < 0)[..., None], 0.0)
    return dz.to(z.dtype)


def _pair_save(ctx, inputs, output):
    *tensors, ctx.keys, ctx.numbers, ctx.places, ctx.levels, ctx.normalize = inputs
    ctx.save_for_backward(*tensors)


def _pair_grad(ctx, grad):
    dz = _pair_backward(grad, *ctx.saved_tensors, ctx.keys, ctx.numbers, ctx.places, ctx.levels, ctx.normalize)
    return dz, *[None] * 9


_pair.register_autograd(_pair_grad, setup_context=_pair_save)


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
        z: [B,K,D]; receives gradient.
        h: [B,N,D], without gradient.
        slots: int64 [B,P,T], the rows of ``z`` at one place, by time; no row in two columns. A negative first entry
            means that there is no such column.
        tokens: int64 [B,P,T], the same as tokens of ``h``.
        call: the function, from a ``RowFunction`` of access COLUMN.
        constants: float [C,T], handed to the function.
        levels, normalize: h is normalised per level as it is read.

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


@torch.library.custom_op("vjepa_fast::latent_loss_column", mutates_args=())
def _column(
    z: Tensor, h: Tensor, slots: Tensor, tokens: Tensor, constants: Tensor, key: str, levels: int, normalize: bool
) -> Tensor:
    _check.in_range("latent_loss_column", "slots", slots, z.shape[1], least=-1)
    _check.in_range("latent_loss_column", "tokens", tokens, h.shape[1], least=-1)
    return _backend.call("latent_loss_column", z, h, slots, tokens, constants, key, levels, normalize)


@_column.register_fake
def _(z, h, slots, tokens, constants, key, levels, normalize):
    return z.new_empty(slots.shape[:2], dtype=torch.promote_types(z.dtype, torch.float32))


def _column_terms(z, h, slots, tokens, constants, key, levels, normalize):
    b, p, t = slots.shape
    there = (slots[..., 0] >= 0)[:, None, :, None]  # [B,1,P,1]
    z_BTPD = _take(_computing(z), slots.clamp(min=0).transpose(1, 2).flatten(1)).view(b, t, p, z.shape[2])
    h_BTPD = _target_rows(h, tokens.clamp(min=0).transpose(1, 2).flatten(1), levels, normalize).view_as(z_BTPD)
    value, slope = _functions[key].formula(z_BTPD, h_BTPD, constants.to(z_BTPD.dtype))
    return value.masked_fill(~there[:, 0], 0.0), slope.masked_fill(~there, 0.0)


@_backend.register("latent_loss_column", "eager")
def _column_eager(z, h, slots, tokens, constants, key, levels, normalize):
    return _column_terms(z, h, slots, tokens, constants, key, levels, normalize)[0].mean(-1)


@torch.library.custom_op("vjepa_fast::latent_loss_column_backward", mutates_args=())
def _column_backward(
    grad: Tensor,
    z: Tensor,
    h: Tensor,
    slots: Tensor,
    tokens: Tensor,
    constants: Tensor,
    key: str,
    levels: int,
    normalize: bool,
) -> Tensor:
    """Dz [B,K,D] from grad [B,P]."""
    return _backend.call("latent_loss_column_backward", grad, z, h, slots, tokens, constants, key, levels, normalize)


@_column_backward.register_fake
def _(grad, z, h, slots, tokens, constants, key, levels, normalize):
    return torch.empty_like(z, memory_format=torch.contiguous_format)


@_backend.register("latent_loss_column_backward", "eager")
def _column_backward_eager(grad, z, h, slots, tokens, constants, key, levels, normalize):
    slope_BTPD = _column_terms(z, h, slots, tokens, constants, key, levels, normalize)[1]
    slope_BTPD = slope_BTPD * (grad / z.shape[-1])[:, None, :, None]
    b, k, d = z.shape
    dz = slope_BTPD.new_zeros(b, k + 1, d)  # a spare row takes what belongs to no column
    where = torch.where(slots >= 0, slots, k).transpose(1, 2).flatten(1)
    return dz.scatter_(1, where[..., None].expand(-1, -1, d), slope_BTPD.flatten(1, 2))[:, :k].to(z.dtype)


def _column_save(ctx, inputs, output):
    *tensors, ctx.key, ctx.levels, ctx.normalize = inputs
    ctx.save_for_backward(*tensors)


def _column_grad(ctx, grad):
    return _column_backward(grad, *ctx.saved_tensors, ctx.key, ctx.levels, ctx.normalize), *[None] * 7


_column.register_autograd(_column_grad, setup_context=_column_save)
