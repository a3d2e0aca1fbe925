"""What a replacement says is held against what the original says."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from vjepa_fast.errors import UserError


def same(got: Any, wanted: Any, name: str, tolerance: float | None = None) -> None:
    """Raise UserError unless two tensors, or lists of tensors, are alike; ``tolerance``: that of their dtypes."""
    many = [list(x) if isinstance(x, (list, tuple)) else [x] for x in (got, wanted)]
    pairs = list(zip(*many))
    alike = len(many[0]) == len(many[1]) and all(isinstance(b, Tensor) and a.shape == b.shape for a, b in pairs)
    if not alike:
        raise different(name)
    close = tolerance or tolerance_of(*many[0], *many[1])
    if not all(torch.allclose(a.float(), b.float(), rtol=close, atol=close, equal_nan=True) for a, b in pairs):
        raise different(name)


def same_gradients(got: list[Tensor | None], wanted: list[Tensor | None], name: str, tolerance: float) -> None:
    """Raise UserError unless gradients differ by at most ``tolerance`` times the largest entry; None is zero."""
    for a, b in zip(got, wanted):
        if a is None or b is None:
            there = b if a is None else a
            if there is not None and there.any():
                raise different(name, "has other gradients than the original")
        else:
            scale = b.float().nan_to_num(0, 0, 0).abs().amax().item() if b.numel() else 0.0
            if not torch.allclose(a.float(), b.float(), rtol=0, atol=tolerance * scale, equal_nan=True):
                raise different(name, "has other gradients than the original")


def tolerance_of(*tensors: Tensor) -> float:
    """1e-5, or 1e-2 if one of them is of 16-bit floats."""
    return 1e-2 if any(x.dtype in (torch.bfloat16, torch.float16) for x in tensors) else 1e-5


def different(name: str, how: str = "computes something else than the original") -> UserError:
    """The error to raise."""
    return UserError(f"{name}: vjepa_fast {how}; leave it as it was")


def once(ours: Callable[..., Any], original: Callable[..., Any], name: str) -> Callable[..., Any]:
    """``ours``; its first call also asks the original."""
    compared = False

    @functools.wraps(original)
    def call(*args: Any, **kwargs: Any) -> Any:
        nonlocal compared
        got = ours(*args, **kwargs)
        if not compared:
            with torch.no_grad():
                same(got, original(*args, **kwargs), name)
            compared = True
        return got

    return call
