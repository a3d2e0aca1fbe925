"""Attention within the segments of a stream of tokens: `attend`, and its backends, one file each.

Several masks, or the samples of a mask that keep different numbers of tokens (`layers.packed.Packed`), lie side by
side in one stream, and each token sees its own segment only. ``runtime.attention`` forces a backend, or the quickest is
measured. The model holds the choice (`layers.block.use_attention`), not the process.

Legend: B batch, K tokens, E embed_dim, H heads, d = E/H channels of a head.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from vjepa_fast import ops
from vjepa_fast.errors import ConfigError
from vjepa_fast.layers.attention.base import (
    BACKENDS,
    Backend,
    Call,
    DeviceSegments,
    Lengths,
    Segments,
    needs_cuda,
    register,
)
from vjepa_fast.layers.attention.sdpa import SDPA
from vjepa_fast.registry import suggestion

__all__ = [
    "BACKENDS",
    "SDPA",
    "Backend",
    "Call",
    "DeviceSegments",
    "Lengths",
    "Segments",
    "attend",
    "find",
    "needs_cuda",
    "register",
    "require",
]


def find(name: str) -> Backend | None:
    """The backend of ``runtime.attention: name``; None for ``auto``.

    Raises:
        ConfigError: there is no such backend.
    """
    if name == "auto":
        return None
    if name not in BACKENDS:
        known = ["auto", *BACKENDS]
        hint = suggestion(name, known)
        raise ConfigError(f"runtime.attention: unknown attention backend {name!r}; accepted: {', '.join(known)}{hint}")
    return BACKENDS[name]


def require(backend: Backend, call: Call) -> None:
    """Refuse a call that the backend does not support (ConfigError with all its reasons)."""
    if reasons := backend.refusals(call):
        raise ConfigError(
            f"runtime.attention: {backend.name} is not supported here: {'; '.join(reasons)}; use runtime.attention=auto"
        )


def attend(
    qkv_BK3E: Tensor, rope: Tensor | None, num_heads: int, lengths: Lengths = None, backend: Backend | None = None
) -> Tensor:
    """Softmax attention of each segment's tokens among themselves, q and k rotated by ``rope``.

    Args:
        qkv_BK3E: queries, keys and values, packed.
        num_heads: H.
        rope: None, or the rows of ``models.rope.rope_table`` of these tokens, with or without a leading B.
        lengths: of the segments along K, the same in every sample, adding up to K; None: one segment. `Segments`, which
            may change at every step, are attended to outside of a compiled graph.
        backend: None: the fastest that supports the call. On a CPU, for one segment and in a graph that is ``sdpa``;
            else those that can are timed, once per shape.

    Returns:
        [B,K,E] of qkv's dtype.

    Raises:
        ConfigError: ``backend`` does not support the call; the message has all its reasons.
    """
    if rope is not None and not rope.is_complex():
        # Nothing else holds qkv, so without autograd it can be turned where it lies.
        rotate = ops.rope3d if torch.is_grad_enabled() else ops.rope3d_
        qkv_BK3E, rope = rotate(qkv_BK3E, rope, num_heads), None
    # Taken apart along their own axis: so the gradients of q, k and v come together packed, without another copy.
    qkv = qkv_BK3E.unflatten(-1, (3, num_heads, -1))
    if rope is None:
        q, k, v = qkv.unbind(2)
    else:
        qk, v = qkv.split((2, 1), 2)
        q, k = _turn(qk, rope).unbind(2)
        v = v.squeeze(2)
    lengths = (q.shape[1],) if lengths is None else lengths
    if isinstance(lengths, Segments) or (backend is not None and not backend.graph):
        return _outside(q, k, v, lengths, backend).flatten(2)
    return _run(q, k, v, lengths, backend).flatten(2)


def _turn(qk_BK2Hd: Tensor, rotor: Tensor) -> Tensor:
    """Rotate channel pairs as complex numbers: one pass, where the real form in PyTorch takes five."""
    dtype = qk_BK2Hd.dtype
    x = qk_BK2Hd if dtype in (torch.float32, torch.float64) else qk_BK2Hd.float()
    x = torch.view_as_complex(x.unflatten(-1, (-1, 2))) * rotor[..., None, None, :]
    return torch.view_as_real(x).flatten(-2).to(dtype)


def _run(q: Tensor, k: Tensor, v: Tensor, lengths: Sequence[int] | Segments, backend: Backend | None) -> Tensor:
    segments = lengths if isinstance(lengths, Segments) else Segments(lengths)
    if backend is None:
        backend = _fastest(q, k, v, segments)
    else:
        require(backend, _call(q, segments))
    return backend(q, k, v, segments)


# never part of a compiled graph
_outside: Callable[..., Tensor] = torch.compiler.disable(_run)  # pyright: ignore[reportAssignmentType]  # it has no types


def _call(q: Tensor, segments: Segments) -> Call:
    return Call(q.device, q.dtype, q.shape[-1], len(segments), isinstance(segments, DeviceSegments))


_measured: dict[tuple, Backend] = {}


def _fastest(q: Tensor, k: Tensor, v: Tensor, segments: Segments) -> Backend:
    """The backend that is quickest forward and backward on tokens of this shape (lengths to the next 128).

    Of many segments, whose lengths differ at every step, the mean and the longest stand for all. Where they are on the
    device the tokens of the stream do, and ``sdpa``, which would compute every segment at its longest, is the last
    resort.
    """
    if len(segments) == 1 or not q.is_cuda or torch.compiler.is_compiling():
        return SDPA  # in a graph without a look at the lengths, which would make a graph for each
    on_device = isinstance(segments, DeviceSegments)
    if on_device:
        lengths = len(segments) * 128, q.shape[1], segments.longest
    else:
        n = segments.lengths
        lengths = n if len(n) <= 4 else (len(n) * 128, sum(n) // len(n), segments.longest)
    key = (q.device, q.dtype, q.shape[0], *q.shape[2:], on_device, *(-(-n // 128) for n in lengths))
    found = _measured.get(key)
    if (found is None or not (found.graph or on_device)) and torch.cuda.is_current_stream_capturing():
        return SDPA  # no time to measure now
    if found is None:
        call = _call(q, segments)
        able = [b for b in BACKENDS.values() if not b.refusals(call) and not (on_device and b is SDPA)]
        seconds = {backend: _seconds(backend, q, k, v, segments) for backend in able}
        best = min(able, key=lambda backend: seconds[backend], default=SDPA)
        found = _measured[key] = best if seconds.get(best, 0.0) < float("inf") else SDPA
    return found


def _seconds(backend: Callable[..., Tensor], q: Tensor, k: Tensor, v: Tensor, segments: Segments) -> float:
    """Time of the quickest of a few passes; infinite for a backend that fails."""
    best = float("inf")
    with torch.enable_grad():
        parts = [x.detach().requires_grad_() for x in (q, k, v)]
        try:
            for _ in range(3):
                torch.cuda.synchronize(q.device)
                began = time.perf_counter()
                torch.autograd.grad(backend(*parts, segments).sum(), parts)
                torch.cuda.synchronize(q.device)
                best = min(best, time.perf_counter() - began)
        except (RuntimeError, NotImplementedError, ValueError):
            return float("inf")
    return best
