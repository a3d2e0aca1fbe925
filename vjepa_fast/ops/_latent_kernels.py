"""The C++ and Triton backends of ``latent.py``: what each supports, and the calls."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from vjepa_fast.ops import _backend, _check, _cpp, _triton
from vjepa_fast.ops._latent_rows import Column, Pair, Token, calls, function


def _dtype_objections(
    backend: str, dtypes: tuple[torch.dtype, ...], tensors: Iterable[Tensor], *args: Any
) -> list[str]:
    found = [t.dtype for t in tensors] + [a for a in args if isinstance(a, torch.dtype)]  # read, and to be written
    wrong = [dtype for dtype in found if dtype not in dtypes]
    return [f"{backend} supports {_check.names(dtypes)}, got {_check.names(wrong)}"] if wrong else []


def _cpp_objections(*args: Any) -> list[str]:
    features, keys = _features_and_keys(args)
    reasons = _cpp.objections(*features) + _dtype_objections("cpp", _cpp.FLOATS, features, *args)
    return reasons + [f"row function {k!r} has no C++" for k in keys if function(k).cpp is None]


def _triton_objections(*args: Any) -> list[str]:
    features, keys = _features_and_keys(args)
    reasons = _triton.objections(*features) or _dtype_objections("triton", _triton.FLOATS, features, *args)
    return reasons + [f"row function {k!r} has no device function" for k in keys if function(k).device is None]


def _features_and_keys(args: tuple[Any, ...]) -> tuple[list[Tensor], list[str]]:
    """The feature tensors among an op's arguments, and the keys of its row functions."""
    for a in args:
        if isinstance(a, (Token, Pair, Column)):
            return [a.z, a.h], a.key.split(",") if a.key else []
    return list(args[:1]), []  # latent_loss_token_sign, or no call at all


def _register(op: str, backend: str) -> Callable[[_backend.Implementation], _backend.Implementation]:
    return _backend.register(op, backend, _cpp_objections if backend == "cpp" else _triton_objections)


@functools.cache
def device_function(key: str) -> Any:
    """The Triton device function of a row function, made once."""
    import triton.language

    make = function(key).device
    assert make is not None, f"row function {key!r} has no device function"
    made = make()
    made.fn.__globals__.setdefault("tl", triton.language)  # the interpreter looks there, not in closures
    return made


def _contiguous(*tensors: Tensor) -> list[Tensor]:
    return [t.contiguous() for t in tensors]


def _rows(*shape: int) -> Tensor:
    return torch.empty(shape, dtype=torch.float32, device="cpu")


# -- C++ ---------------------------------------------------------------------------------------------------------------
def _token_tensors(a: Token) -> list[Tensor]:
    return _contiguous(a.z, a.h, a.idx, a.idx.new_empty(0, 0) if a.after is None else a.after)


def _token_numbers(a: Token) -> tuple[Any, ...]:
    return function(a.key).cpp, a.numbers[0], a.target, a.places, a.levels, a.normalize


@_register("latent_loss_token", "cpp")
def _token_cpp(a: Token, keep: bool) -> tuple[Tensor, Tensor]:
    slopes = a.z.new_empty(a.z.shape if keep and function(a.key).sign else (0,), dtype=torch.int8)
    rows = _rows(*a.z.shape[:2])
    torch.ops.vjepa_fast_cpp.latent_token(*_token_tensors(a), rows, slopes, *_token_numbers(a))
    return rows, slopes


@_register("latent_loss_token_sign", "cpp")
def _token_sign_cpp(grad: Tensor, sign: Tensor, dtype: torch.dtype) -> Tensor:
    dz = sign.new_empty(sign.shape, dtype=dtype)
    torch.ops.vjepa_fast_cpp.latent_token_sign(grad.contiguous(), sign, dz)
    return dz


@_register("latent_loss_token_backward", "cpp")
def _token_backward_cpp(grad: Tensor, a: Token) -> Tensor:
    dz = torch.empty_like(a.z, memory_format=torch.contiguous_format)
    torch.ops.vjepa_fast_cpp.latent_token_backward(grad.contiguous(), *_token_tensors(a), dz, *_token_numbers(a))
    return dz


@functools.lru_cache(256)
@torch.inference_mode(False)
def _table(keys: str, numbers: tuple[float, ...]) -> Tensor:
    """int64 [R,4]: number and window of each function."""
    rows = [(fn.cpp, *window) for fn, _, window in calls(keys, numbers)]
    return torch.tensor(rows, dtype=torch.int64, device="cpu")


@_register("latent_loss_pair", "cpp")
def _pair_cpp(a: Pair) -> Tensor:
    table = _table(a.key, tuple(a.numbers))
    rows = _rows(len(table), *a.z.shape[:2])
    tensors = _contiguous(*a[:4])
    torch.ops.vjepa_fast_cpp.latent_pair(*tensors, table, rows, a.places, a.levels, a.normalize)
    return rows


@_register("latent_loss_pair_backward", "cpp")
def _pair_backward_cpp(grad: Tensor, a: Pair) -> Tensor:
    tensors, table = _contiguous(grad, *a[:5]), _table(a.key, tuple(a.numbers))
    dz = torch.empty_like(tensors[1])
    torch.ops.vjepa_fast_cpp.latent_pair_backward(*tensors, table, dz, a.places, a.levels, a.normalize)
    return dz


@_register("latent_loss_column", "cpp")
def _column_cpp(a: Column) -> Tensor:
    rows = _rows(*a.slots.shape[:2])
    tensors = _contiguous(a.z, a.h, a.slots, a.tokens, a.constants.float())
    torch.ops.vjepa_fast_cpp.latent_column(*tensors, rows, function(a.key).cpp, a.levels, a.normalize)
    return rows


@_register("latent_loss_column_backward", "cpp")
def _column_backward_cpp(grad: Tensor, a: Column) -> Tensor:
    tensors = _contiguous(grad, a.z, a.h, a.slots, a.tokens, a.constants.float())
    dz = torch.zeros_like(tensors[1])
    torch.ops.vjepa_fast_cpp.latent_column_backward(*tensors, dz, function(a.key).cpp, a.levels, a.normalize)
    return dz


# -- Triton ------------------------------------------------------------------------------------------------------------
def _launch(function: str, on: Tensor, *args: Any) -> Any:
    return _triton.launch("latent", function, on, *args)


def _token_arguments(a: Token) -> tuple[Any, ...]:
    return *a[:4], device_function(a.key), a.numbers[0], a.target, a.places, a.levels, a.normalize


def _pair_arguments(a: Pair) -> tuple[Any, ...]:
    launched = [(device_function(fn.key), p, window, "h" in fn.reads) for fn, p, window in calls(a.key, a.numbers)]
    return launched, a.places, a.levels, a.normalize


@_register("latent_loss_token", "triton")
def _token_triton(a: Token, keep: bool) -> tuple[Tensor, Tensor]:
    return _launch("token", a.z, *_token_arguments(a), keep and function(a.key).sign)


@_register("latent_loss_token_sign", "triton")
def _token_sign_triton(grad: Tensor, sign: Tensor, dtype: torch.dtype) -> Tensor:
    return _launch("token_from_sign", sign, grad, sign, dtype)


@_register("latent_loss_token_backward", "triton")
def _token_backward_triton(grad: Tensor, a: Token) -> Tensor:
    return _launch("token_gradient", a.z, grad, *_token_arguments(a))


@_register("latent_loss_pair", "triton")
def _pair_triton(a: Pair) -> Tensor:
    return _launch("pair", a.z, *a[:4], *_pair_arguments(a))


@_register("latent_loss_pair_backward", "triton")
def _pair_backward_triton(grad: Tensor, a: Pair) -> Tensor:
    return _launch("pair_gradient", a.z, grad, *a[:5], *_pair_arguments(a))


@_register("latent_loss_column", "triton")
def _column_triton(a: Column) -> Tensor:
    return _launch("column", a.z, *a[:5], device_function(a.key), a.levels, a.normalize)


@_register("latent_loss_column_backward", "triton")
def _column_backward_triton(grad: Tensor, a: Column) -> Tensor:
    return _launch("column_gradient", a.z, grad, *a[:5], device_function(a.key), a.levels, a.normalize)
