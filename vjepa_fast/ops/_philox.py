"""Philox 4x32-10: random numbers that are a pure function of a key and a counter.

Salmon et al., "Parallel Random Numbers: As Easy as 1, 2, 3" (SC 2011). Integers only, so that every
backend gives the same bits.
Every number a mask uses comes from one call, with

    key     = (seed low 32 bits, seed high 32 bits)
    counter = (sample index low 32 bits, sample index high 32 bits, step, stream)
    stream  = kind << 28 | spec << 20 | attempt << 14 | item

``kind`` is one of the constants below. SIZE: sample index, attempt and item are 0; words 0 to 2 give time, scale and
aspect. ORIGIN: item is the block (14 bits); words 0 to 2 place it along t, y and x, word 3 draws from the saliency.
TRUNCATE: no attempt, item is the group of four tokens (20 bits), one word each.
"""

from __future__ import annotations

from typing import Any, overload

from torch import Tensor

SIZE, ORIGIN, TRUNCATE = range(3)
MAX_SPECS, MAX_ATTEMPTS, MAX_ITEMS = 1 << 8, 1 << 6, 1 << 20

_MASK = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)


def _multiply(x: Any, factor: int) -> tuple[Any, Any]:
    """High and low 32 bits of x * factor; in 16-bit halves, so that nothing exceeds 49 bits of an int64."""
    if isinstance(x, int):
        return x * factor >> 32, x * factor & _MASK
    high = (x >> 16) * factor
    low = (x & 0xFFFF) * factor
    return (high + (low >> 16)) >> 16, (((high & 0xFFFF) << 16) + low) & _MASK


def philox4x32(counter: tuple[Any, Any, Any, Any], key: tuple[int, int]) -> tuple[Any, Any, Any, Any]:
    """Four random 32-bit words per counter.

    ``counter``: four ints or int64 tensors of values in [0, 2**32) that broadcast together. ``key``: two such ints.
    Returns four int64 tensors (ints, where all four are) of values in [0, 2**32).
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        high0, low0 = _multiply(c0, _MULTIPLIERS[0])
        high1, low1 = _multiply(c2, _MULTIPLIERS[1])
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + _WEYL[0]) & _MASK, (k1 + _WEYL[1]) & _MASK
    return c0, c1, c2, c3


@overload
def words(seed: int, step: int, sample: int, stream: int) -> tuple[int, int, int, int]: ...
@overload
def words(seed: int, step: int, sample: Tensor, stream: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]: ...
def words(seed: int, step: int, sample: int | Tensor, stream: int | Tensor) -> tuple[Any, Any, Any, Any]:
    """The four words of (seed, step, sample, stream); ``sample`` and ``stream`` are ints, or int64 and broadcast."""
    if not 0 <= step <= _MASK:
        raise ValueError(f"step must be in [0, 2**32), got {step}")
    key = (seed & _MASK, (seed >> 32) & _MASK)
    return philox4x32((sample & _MASK, (sample >> 32) & _MASK, step, stream), key)
