"""The C++ and Triton backends of ``latent.py``: what each supports, and the calls."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from vjepa_fast.ops import _backend, _check, _cpp, _triton
from vjepa_fast.ops._latent_rows import Column, Pair, Token, calls, function


def _dtype_objections(backend: str, dtypes: tuple[torch.dtype, ...], tensors: Iterable[Tensor]) -> list[str]:
    wrong = [t.dtype for t in tensors if t.dtype not in dtypes]
    return [f"{backend} supports {_check.names(dtypes)}, got {_check.names(wrong)}"] if wrong else []


def _cpp_objections(*args: Any) -> list[str]:
    features, keys = _features_and_keys(args)
    reasons = _cpp.objections(*features) + _dtype_objections("cpp", _cpp.FLOATS, features)
    return reasons + [f"row function {k!r} has no C++" for k in keys if function(k).cpp is None]


def _triton_objections(*args: Any) -> list[str]:
    features, keys = _features_and_keys(args)
    reasons = _triton.objections(*features) or _dtype_objections("triton", _triton.FLOATS, features)
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


def _or_empty(x: Tensor | None, like: Tensor) -> Tensor:
    return like.new_empty((0, 0), dtype=torch.int64) if x is None else x.contiguous()


def _contiguous(*tensors: Tensor) -> list[Tensor]:
    return [t.contiguous() for t in tensors]


def _rows(*shape: int) -> Tensor:
    return torch.empty(shape, dtype=torch.float32, device="cpu")


# -- C++ ---------------------------------------------------------------------------------------------------------------
@_register("latent_loss_token", "cpp")
def _token_cpp(a: Token, keep: bool) -> tuple[Tensor, Tensor]:
    fn, (z, h, idx) = function(a.key), _contiguous(a.z, a.h, a.idx)
    rows = _rows(*z.shape[:2])
    slopes = z.new_empty(z.shape if keep and fn.sign else (0,), dtype=torch.int8)
    where = a.target, a.places, a.levels, a.normalize
    torch.ops.vjepa_fast_cpp.latent_token(
        z, h, idx, _or_empty(a.after, idx), rows, slopes, fn.cpp, a.numbers[0], *where
    )
    return rows, slopes


@_register("latent_loss_token_sign", "cpp")
def _token_sign_cpp(grad: Tensor, sign: Tensor, dtype: torch.dtype) -> Tensor:
    dz = sign.new_empty(sign.shape, dtype=dtype)
    torch.ops.vjepa_fast_cpp.latent_token_sign(grad.contiguous(), sign, dz)
    return dz


@_register("latent_loss_token_backward", "cpp")
def _token_backward_cpp(grad: Tensor, a: Token) -> Tensor:
    grad, z, h, idx = _contiguous(grad, a.z, a.h, a.idx)
    dz, after, where = torch.empty_like(z), _or_empty(a.after, idx), (a.target, a.places, a.levels, a.normalize)
    torch.ops.vjepa_fast_cpp.latent_token_backward(
        grad, z, h, idx, after, dz, function(a.key).cpp, a.numbers[0], *where
    )
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
    torch.ops.vjepa_fast_cpp.latent_pair(
        *_contiguous(a.z, a.h, a.idx, a.after), table, rows, a.places, a.levels, a.normalize
    )
    return rows


@_register("latent_loss_pair_backward", "cpp")
def _pair_backward_cpp(grad: Tensor, a: Pair) -> Tensor:
    tensors = _contiguous(grad, a.z, a.h, a.idx, a.after, a.before)
    dz = torch.empty_like(tensors[1])
    torch.ops.vjepa_fast_cpp.latent_pair_backward(
        *tensors, _table(a.key, tuple(a.numbers)), dz, a.places, a.levels, a.normalize
    )
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
def _token_arguments(a: Token) -> tuple[Any, ...]:
    place = a.target, a.places, a.levels, a.normalize
    return a.z, a.h, a.idx, a.after, device_function(a.key), a.numbers[0], *place


def _triton_calls(a: Pair) -> list[tuple[Any, ...]]:
    return [(device_function(fn.key), p, window, "h" in fn.reads) for fn, p, window in calls(a.key, a.numbers)]


@_register("latent_loss_token", "triton")
def _token_triton(a: Token, keep: bool) -> tuple[Tensor, Tensor]:
    with _triton.device_of(a.z):
        return _triton.kernels("latent").token(*_token_arguments(a), keep and function(a.key).sign)


@_register("latent_loss_token_sign", "triton")
def _token_sign_triton(grad: Tensor, sign: Tensor, dtype: torch.dtype) -> Tensor:
    with _triton.device_of(sign):
        return _triton.kernels("latent").token_from_sign(grad, sign, dtype)


@_register("latent_loss_token_backward", "triton")
def _token_backward_triton(grad: Tensor, a: Token) -> Tensor:
    with _triton.device_of(a.z):
        return _triton.kernels("latent").token_gradient(grad, *_token_arguments(a))


@_register("latent_loss_pair", "triton")
def _pair_triton(a: Pair) -> Tensor:
    with _triton.device_of(a.z):
        return _triton.kernels("latent").pair(
            a.z, a.h, a.idx, a.after, _triton_calls(a), a.places, a.levels, a.normalize
        )


@_register("latent_loss_pair_backward", "triton")
def _pair_backward_triton(grad: Tensor, a: Pair) -> Tensor:
    with _triton.device_of(a.z):
        return _triton.kernels("latent").pair_gradient(
            grad, a.z, a.h, a.idx, a.after, a.before, _triton_calls(a), a.places, a.levels, a.normalize
        )


@_register("latent_loss_column", "triton")
def _column_triton(a: Column) -> Tensor:
    with _triton.device_of(a.z):
        return _triton.kernels("latent").column(*a[:5], device_function(a.key), a.levels, a.normalize)


@_register("latent_loss_column_backward", "triton")
def _column_backward_triton(grad: Tensor, a: Column) -> Tensor:
    with _triton.device_of(a.z):
        return _triton.kernels("latent").column_gradient(grad, *a[:5], device_function(a.key), a.levels, a.normalize)
