"""Powers of the distance between features and targets, as row functions. See ``latent.py``."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from vjepa_fast.ops._latent_rows import RowCall, RowFunction

TokenRow = tuple[Tensor, Tensor]  # value, slope in x


def _l1_device() -> Any:
    import triton
    import triton.language as tl

    @triton.jit
    def l1(x: tl.tensor, y: tl.tensor, p: tl.tensor) -> tuple[tl.tensor, ...]:
        d = x - y
        return tl.abs(d), tl.where(d > 0, 1.0, tl.where(d < 0, -1.0, 0.0))

    return l1


def _square_device() -> Any:
    import triton
    import triton.language as tl

    @triton.jit
    def square(x: tl.tensor, y: tl.tensor, p: tl.tensor) -> tuple[tl.tensor, ...]:
        d = x - y
        return 0.5 * d * d, d

    return square


def _power_device() -> Any:
    import triton
    import triton.language as tl

    @triton.jit
    def power(x: tl.tensor, y: tl.tensor, p: tl.tensor) -> tuple[tl.tensor, ...]:
        d = x - y
        size = tl.abs(d)
        lower = tl.exp2((p - 1) * tl.log2(size))  # |d|^(p-1); 0 at 0
        return lower * size / p, tl.where(d < 0, -lower, lower)

    return power


def _l1(x: Tensor, y: Tensor, p: float) -> TokenRow:
    d = x - y
    return d.abs(), d.sign()


def _square(x: Tensor, y: Tensor, p: float) -> TokenRow:
    d = x - y
    return 0.5 * d * d, d


def _power(x: Tensor, y: Tensor, p: float) -> TokenRow:
    d = x - y
    return d.abs() ** p / p, d.sign() * d.abs() ** (p - 1)


L1 = RowFunction("l1", "TOKEN", _l1, _l1_device, cpp=0, sign=True)
SQUARE = RowFunction("square", "TOKEN", _square, _square_device, cpp=1)
POWER = RowFunction("power", "TOKEN", _power, _power_device, cpp=2)


def power_error(p: float) -> RowCall:
    """abs(x - y)^p / p, p >= 1."""
    return L1() if p == 1 else SQUARE() if p == 2 else POWER(p)
