"""The C++ and Triton backends of ``ops/latent.py``: what each can serve, and the calls."""

from __future__ import annotations

import functools

import torch

from vjepa_fast.ops import _backend, _cpp, _triton
from vjepa_fast.ops.latent import calls, function

_CPP_DTYPES, _TRITON_DTYPES = (torch.float32, torch.bfloat16), (torch.float32, torch.bfloat16, torch.float16)


def _names(dtypes):
    return ", ".join(str(d).removeprefix("torch.") for d in dtypes)


def _dtype_objections(backend, dtypes, tensors):
    wrong = [t.dtype for t in tensors if t.dtype not in dtypes]
    return [f"{backend} serves {_names(dtypes)}, got {_names(wrong)}"] if wrong else []


def _cpp_objections(features, keys):
    reasons = _cpp.objections(*features) + _dtype_objections("cpp", _CPP_DTYPES, features)
    return reasons + [f"row function {k!r} has no C++" for k in keys.split(",") if k and function(k).cpp is None]


def _triton_objections(features, keys):
    reasons = _triton.objections(*features)
    if not reasons:
        reasons = _dtype_objections("triton", _TRITON_DTYPES, features)
    return reasons + [
        f"row function {k!r} has no device function" for k in keys.split(",") if k and function(k).device is None
    ]


def _register(op, features, key):
    """Register the decorated pair of functions for ``op``.

    ``features``: positions of the feature tensors among the arguments, ``key``: that of the functions' keys.
    """

    def objections(check, args):
        return check([args[n] for n in features] if args else [], args[key] if args and key is not None else "")

    def add(make):
        cpp, triton = make()
        _backend.register(op, "cpp", lambda *args: objections(_cpp_objections, args))(cpp)
        _backend.register(op, "triton", lambda *args: objections(_triton_objections, args))(triton)
        return make

    return add


@functools.cache
def device_function(key: str):
    """The Triton device function of a row function, made once."""
    import triton.language

    made = function(key).device()
    made.fn.__globals__.setdefault("tl", triton.language)  # the interpreter looks there, not in closures
    return made


def _kernels():
    from vjepa_fast.kernels import latent

    return latent


def _or_empty(x, like):
    return like.new_empty((0, 0), dtype=torch.int64) if x is None else x.contiguous()


def _contiguous(*tensors):
    return [t.contiguous() for t in tensors]


@_register("latent_loss_token", (0, 1), 4)
def _token():
    def cpp(z, h, idx, after, key, numbers, target, places, levels, normalize, keep):
        fn = function(key)
        z, h, idx = _contiguous(z, h, idx)
        rows = torch.empty(z.shape[:2], dtype=torch.float32)
        slopes = torch.empty(z.shape if keep and fn.sign else (0,), dtype=torch.int8)
        torch.ops.vjepa_fast_cpp.latent_token(
            z, h, idx, _or_empty(after, idx), rows, slopes, fn.cpp, numbers[0], target, places, levels, normalize
        )
        return rows, slopes

    def triton(z, h, idx, after, key, numbers, target, places, levels, normalize, keep):
        with _triton.device_of(z):
            return _kernels().token(
                z,
                h,
                idx,
                after,
                device_function(key),
                numbers[0],
                target,
                places,
                levels,
                normalize,
                keep and function(key).sign,
            )

    return cpp, triton


@_register("latent_loss_token_sign", (0,), None)
def _token_sign():
    def cpp(grad, sign, dtype):
        dz = torch.empty(sign.shape, dtype=dtype)
        torch.ops.vjepa_fast_cpp.latent_token_sign(grad.contiguous(), sign, dz)
        return dz

    def triton(grad, sign, dtype):
        with _triton.device_of(sign):
            return _kernels().token_from_sign(grad, sign, dtype)

    return cpp, triton


@_register("latent_loss_token_backward", (1, 2), 5)
def _token_backward():
    def cpp(grad, z, h, idx, after, key, numbers, target, places, levels, normalize):
        grad, z, h, idx = _contiguous(grad, z, h, idx)
        dz = torch.empty_like(z)
        torch.ops.vjepa_fast_cpp.latent_token_backward(
            grad, z, h, idx, _or_empty(after, idx), dz, function(key).cpp, numbers[0], target, places, levels, normalize
        )
        return dz

    def triton(grad, z, h, idx, after, key, numbers, target, places, levels, normalize):
        with _triton.device_of(z):
            return _kernels().token_gradient(
                grad, z, h, idx, after, device_function(key), numbers[0], target, places, levels, normalize
            )

    return cpp, triton


@functools.lru_cache(256)
def _cpp_calls(keys, numbers):
    rows = [[fn.cpp, *window] for fn, _, window in calls(keys, numbers)]
    return torch.tensor(rows, dtype=torch.int64)


def _triton_calls(keys, numbers):
    return [(device_function(fn.key), p, window, "h" in fn.reads) for fn, p, window in calls(keys, numbers)]


@_register("latent_loss_pair", (0, 1), 5)
def _pair():
    def cpp(z, h, idx, after, before, keys, numbers, places, levels, normalize):
        table = _cpp_calls(keys, tuple(numbers))
        rows = torch.empty((len(table), *z.shape[:2]), dtype=torch.float32)
        torch.ops.vjepa_fast_cpp.latent_pair(*_contiguous(z, h, idx, after), table, rows, places, levels, normalize)
        return rows

    def triton(z, h, idx, after, before, keys, numbers, places, levels, normalize):
        with _triton.device_of(z):
            return _kernels().pair(z, h, idx, after, _triton_calls(keys, numbers), places, levels, normalize)

    return cpp, triton


@_register("latent_loss_pair_backward", (1, 2), 6)
def _pair_backward():
    def cpp(grad, z, h, idx, after, before, keys, numbers, places, levels, normalize):
        grad, z, h, idx, after, before = _contiguous(grad, z, h, idx, after, before)
        dz = torch.empty_like(z)
        torch.ops.vjepa_fast_cpp.latent_pair_backward(
            grad, z, h, idx, after, before, _cpp_calls(keys, tuple(numbers)), dz, places, levels, normalize
        )
        return dz

    def triton(grad, z, h, idx, after, before, keys, numbers, places, levels, normalize):
        with _triton.device_of(z):
            return _kernels().pair_gradient(
                grad, z, h, idx, after, before, _triton_calls(keys, numbers), places, levels, normalize
            )

    return cpp, triton


@_register("latent_loss_column", (0, 1), 5)
def _column():
    def cpp(z, h, slots, tokens, constants, key, levels, normalize):
        rows = torch.empty(slots.shape[:2], dtype=torch.float32)
        z, h, slots, tokens, constants = _contiguous(z, h, slots, tokens, constants.float())
        torch.ops.vjepa_fast_cpp.latent_column(
            z, h, slots, tokens, constants, rows, function(key).cpp, levels, normalize
        )
        return rows

    def triton(z, h, slots, tokens, constants, key, levels, normalize):
        with _triton.device_of(z):
            return _kernels().column(z, h, slots, tokens, constants, device_function(key), levels, normalize)

    return cpp, triton


@_register("latent_loss_column_backward", (1, 2), 6)
def _column_backward():
    def cpp(grad, z, h, slots, tokens, constants, key, levels, normalize):
        grad, z, h, slots, tokens, constants = _contiguous(grad, z, h, slots, tokens, constants.float())
        dz = torch.zeros_like(z)
        torch.ops.vjepa_fast_cpp.latent_column_backward(
            grad, z, h, slots, tokens, constants, dz, function(key).cpp, levels, normalize
        )
        return dz

    def triton(grad, z, h, slots, tokens, constants, key, levels, normalize):
        with _triton.device_of(z):
            return _kernels().column_gradient(
                grad, z, h, slots, tokens, constants, device_function(key), levels, normalize
            )

    return cpp, triton
