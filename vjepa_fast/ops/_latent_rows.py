"""Row functions of the latent losses, the arguments of their ops, and the eager backend. See ``latent.py``."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from vjepa_fast.ops import _backend
from vjepa_fast.ops.norm import EPS

TARGETS = ("same", "next", "step")  # h at the token, one time step later, and the difference of the two
Window = tuple[int, int, int]


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
        cpp: its number in csrc/latent.cpp; None: eager code runs on the CPU.
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

    def __post_init__(self) -> None:
        # here rather than at a call, which torch.compile may trace: what it writes is there after the graph only
        known = _functions.setdefault(self.key, self)
        if known != self and known.formula.__qualname__ != self.formula.__qualname__:
            raise ValueError(f"row function {self.key!r} is defined twice")

    def __call__(self, p: float = 0.0, window: Window | None = None) -> RowCall:
        """The function with its parameter and channels; see ``RowCall``."""
        return RowCall(self.key, float(p), window)


@dataclass(frozen=True)
class RowCall:
    """``p``: parameter. ``window`` (low, high, period): channels c with low <= c % period < high; None means all."""

    key: str
    p: float = 0.0
    window: Window | None = None

    def numbers(self, dim: int) -> list[float]:
        """``p`` and the window as an op's schema has them, for ``dim`` channels."""
        low, high, period = self.window or (0, dim, dim)
        return [self.p, float(low), float(high), float(period)]


_functions: dict[str, RowFunction] = {}


def function(key: str) -> RowFunction:
    """The row function of that key."""
    return _functions[key]


def functions() -> tuple[str, ...]:
    """Keys of all row functions that were made so far."""
    return tuple(_functions)


def calls(keys: str, numbers: Sequence[float]) -> list[tuple[RowFunction, float, Window]]:
    """(function, p, window) of each call, from the flat form that an op's schema has."""
    rows = [numbers[n : n + 4] for n in range(0, len(numbers), 4)]
    return [(_functions[k], p, (int(a), int(b), int(c))) for k, (p, a, b, c) in zip(keys.split(","), rows)]


# -- arguments of the ops, as their schemas have them ------------------------------------------------------------------
class Token(NamedTuple):
    """Arguments of ``latent_loss_token``."""

    z: Tensor
    h: Tensor
    idx: Tensor
    after: Tensor | None
    key: str
    numbers: Sequence[float]
    target: int
    places: int
    levels: int
    normalize: bool


class Pair(NamedTuple):
    """Arguments of ``latent_loss_pair``."""

    z: Tensor
    h: Tensor
    idx: Tensor
    after: Tensor
    before: Tensor
    key: str  # of all functions, by commas
    numbers: Sequence[float]
    places: int
    levels: int
    normalize: bool


class Column(NamedTuple):
    """Arguments of ``latent_loss_column``."""

    z: Tensor
    h: Tensor
    slots: Tensor
    tokens: Tensor
    constants: Tensor
    key: str
    levels: int
    normalize: bool


# -- eager -------------------------------------------------------------------------------------------------------------
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


@_backend.register("latent_loss_token", "eager")
def token(a: Token, keep: bool) -> tuple[Tensor, Tensor]:
    """Rows [B,K], and with ``keep`` the slopes [B,K,D] of a ``sign`` function (else empty)."""
    value, slope = _token_terms(a)
    kept = slope.to(torch.int8) if keep and function(a.key).sign else a.z.new_empty(0, dtype=torch.int8)
    return value.mean(-1), kept


def _token_terms(a: Token) -> tuple[Tensor, Tensor]:
    y = _target_rows(a.h, a.idx if a.target == 0 else a.idx + a.places, a.levels, a.normalize)
    if TARGETS[a.target] == "step":
        y = y - _target_rows(a.h, a.idx, a.levels, a.normalize)
    ((fn, p, _),) = calls(a.key, a.numbers)
    value, slope = fn.formula(_computing(a.z), y, p)
    if a.after is not None:
        dead = (a.after < 0)[..., None]
        value, slope = value.masked_fill(dead, 0.0), slope.masked_fill(dead, 0.0)
    return value, slope


@_backend.register("latent_loss_token_sign", "eager")
def _token_sign(grad: Tensor, sign: Tensor, dtype: torch.dtype) -> Tensor:
    return (sign.to(grad.dtype) * (grad / sign.shape[-1])[..., None]).to(dtype)


@_backend.register("latent_loss_token_backward", "eager")
def _token_backward(grad: Tensor, a: Token) -> Tensor:
    return (_token_terms(a)[1] * (grad / a.z.shape[-1])[..., None]).to(a.z.dtype)


@_backend.register("latent_loss_pair", "eager")
def pair(a: Pair) -> Tensor:
    """Rows [R,B,K]."""
    return torch.stack([parts[0].sum(-1) / count for parts, count in _pair_terms(a)])


def _pair_terms(a: Pair) -> Iterator[tuple[list[Tensor], int]]:
    """Per call: (value, d/dz0, d/dz1), each [B,K,D], 0 outside pairs and window; and the channel count."""
    z0 = _computing(a.z)
    z1 = _take(z0, a.after.clamp(min=0))
    h0, h1 = (_target_rows(a.h, i, a.levels, a.normalize) for i in (a.idx, a.idx + a.places))
    for fn, p, window in calls(a.key, a.numbers):
        mask, count = _window_mask(window, a.z.shape[2], z0)
        parts = [x.masked_fill((a.after < 0)[..., None], 0.0) for x in fn.formula(z0, z1, h0, h1, p)]
        yield [x if mask is None else x * mask for x in parts], count


@_backend.register("latent_loss_pair_backward", "eager")
def _pair_backward(grad: Tensor, a: Pair) -> Tensor:
    dz = torch.zeros_like(a.z, dtype=torch.promote_types(a.z.dtype, torch.float32))
    for g_BK, ((_, to_0, to_1), count) in zip(grad, _pair_terms(a)):
        g = (g_BK / count)[..., None]
        dz += g * to_0
        dz += _take(g * to_1, a.before.clamp(min=0)).masked_fill((a.before < 0)[..., None], 0.0)
    return dz.to(a.z.dtype)


@_backend.register("latent_loss_column", "eager")
def _column(a: Column) -> Tensor:
    return _column_terms(a)[0].mean(-1)


def _column_terms(a: Column) -> tuple[Tensor, Tensor]:
    b, p, t = a.slots.shape
    there = (a.slots[..., 0] >= 0)[:, None, :, None]  # [B,1,P,1]
    z_BTPD = _take(_computing(a.z), a.slots.clamp(min=0).transpose(1, 2).flatten(1)).view(b, t, p, a.z.shape[2])
    h = _target_rows(a.h, a.tokens.clamp(min=0).transpose(1, 2).flatten(1), a.levels, a.normalize)
    value, slope = function(a.key).formula(z_BTPD, h.view_as(z_BTPD), a.constants.to(z_BTPD.dtype))
    return value.masked_fill(~there[:, 0], 0.0), slope.masked_fill(~there, 0.0)


@_backend.register("latent_loss_column_backward", "eager")
def _column_backward(grad: Tensor, a: Column) -> Tensor:
    slope_BTPD = _column_terms(a)[1] * (grad / a.z.shape[-1])[:, None, :, None]
    b, k, d = a.z.shape
    dz = slope_BTPD.new_zeros(b, k + 1, d)  # a spare row takes what belongs to no column
    where = torch.where(a.slots >= 0, a.slots, k).transpose(1, 2).flatten(1)
    return dz.scatter_(1, where[..., None].expand(-1, -1, d), slope_BTPD.flatten(1, 2))[:, :k].to(a.z.dtype)
