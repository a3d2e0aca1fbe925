"""What ``runtime.attention: auto`` is: for each shape the backend that was quickest when it was first met.

Outside of graphs a shape that is not in the table (`table.Table`) is measured. In a CUDA graph that is being captured
nothing can be measured: the table's answer holds, and without one `unmeasured`. A graph of torch.compile sees neither
lengths nor tables: there it is what `layers.block.choose_attention` has put in the layer for whole grids, and else
torch's own choice among all kernels but cuDNN's (`attend`).
"""

from __future__ import annotations

import contextlib
import functools
import logging
import math
from collections.abc import Callable
from importlib import metadata

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from vjepa_fast.layers.attention.base import BACKENDS, Backend, Call, DeviceSegments, Segments
from vjepa_fast.layers.attention.rotary import applied
from vjepa_fast.layers.attention.sdpa import SDPA, SDPA_FLASH, STEADY
from vjepa_fast.layers.attention.table import Row, Table

_log = logging.getLogger("vjepa_fast")
TABLE = Table()
_found: dict[tuple[str, str], Backend] = {}  # of this process, by environment and shape
_PASSES, _AHEAD = 5, 10_000_000  # timed passes; cycles that the device spins while the host launches one
_FAILURES = (RuntimeError, ValueError, TypeError, AssertionError)
_TOLERANCE = 0.05  # of the largest value, between a backend and PyTorch's own attention


def fastest(qkv_BK3E: Tensor, rope: Tensor | None, num_heads: int, segments: Segments, whole: bool = False) -> Backend:
    """The backend to take for these tokens.

    Args:
        qkv_BK3E: as of `attend`; not changed.
        rope: as of `attend`.
        num_heads: H.
        segments: in the stream.
        whole: each sample is one segment, as long as ever (a clip's grid).
    """
    if not qkv_BK3E.is_cuda:
        return SDPA
    on_device = isinstance(segments, DeviceSegments)
    call = call_of(qkv_BK3E, num_heads, segments, repeats=whole or on_device)
    key = environment(qkv_BK3E.device), shape_of(qkv_BK3E, rope, num_heads, segments, call)
    capturing = torch.cuda.is_current_stream_capturing()
    found = _found.get(key) or _kept(key, call)
    if found is None and not capturing:
        found = _measure(key, call, qkv_BK3E, rope, num_heads, segments)
    if found is None or (capturing and not found.capture):
        return unmeasured(call)
    _found[key] = found
    return found


def for_whole_grids(
    device: torch.device, dtype: torch.dtype, batch: int, tokens: int, width: int, num_heads: int
) -> Backend:
    """The backend that a compiled graph takes for whole grids [batch,tokens,width] on CUDA without gradient.

    The quickest of those that can be part of a graph, with rotary positions; measured now where the table has no row.
    """
    generator = torch.Generator(device).manual_seed(0)  # that of the run stays where it is
    qkv = torch.randn(batch, tokens, 3 * width, device=device, dtype=dtype, generator=generator)
    rope = torch.ones(tokens, 2, width // num_heads // 2 * 2, device=device)
    segments = Segments((tokens,))
    with torch.no_grad():
        best = fastest(qkv, rope, num_heads, segments, whole=True)
        call = call_of(qkv, num_heads, segments)
        row = TABLE.rows(environment(device)).get(shape_of(qkv, rope, num_heads, segments, call))
    if best.whole_graph:
        return best
    ms = row["ms"] if row else {}
    able = [b for b in BACKENDS.values() if b.whole_graph and ms.get(b.name) is not None]
    return min(able, key=lambda b: ms[b.name], default=unmeasured(call))


def call_of(qkv_BK3E: Tensor, num_heads: int, segments: Segments, repeats: bool = True) -> Call:
    """What backends are asked about ``qkv``."""
    return Call(
        qkv_BK3E.device,
        qkv_BK3E.dtype,
        qkv_BK3E.shape[-1] // (3 * num_heads),
        len(segments),
        isinstance(segments, DeviceSegments),
        torch.is_grad_enabled() and qkv_BK3E.requires_grad,
        repeats,
        qkv_BK3E.stride(-1),
        segments.longest,
    )


def candidates(call: Call) -> list[Backend]:
    """The backends to measure for a call on CUDA: all that support it, but for those that plan if it does not repeat.

    Nor those that are not to be timed (`Backend.timed`).

    Plain ``sdpa`` is none: the implementations that it chooses from stand beside it under their own names.
    """
    known = [b for b in BACKENDS.values() if b.timed and b is not SDPA and (call.repeats or not b.plans)]
    able = [b for b in known if not b.refusals(call)]
    return able if able or call.on_device else [STEADY]


def unmeasured(call: Call) -> Backend:
    """The backend where nothing is known and nothing can be measured: the first of these that supports the call.

    ``varlen`` for `DeviceSegments`, else ``sdpa_flash``; last, PyTorch's own choice among all but cuDNN, which would
    build a plan.
    """
    first = BACKENDS["varlen"] if call.on_device else SDPA_FLASH
    return STEADY if first.refusals(call) else first


@functools.cache
def environment(device: torch.device) -> str:
    """Device and versions that measurements hold for."""
    triton = "no triton"
    for name in ("triton", "pytorch-triton", "triton-windows"):
        with contextlib.suppress(metadata.PackageNotFoundError):
            triton = f"triton {metadata.version(name)}"
            break
    versions = sorted({b.version() for b in BACKENDS.values()} - {""})
    own = [name for name in BACKENDS if BACKENDS[name].__class__.__module__.split(".")[0] != "vjepa_fast"]
    return ", ".join([torch.cuda.get_device_name(device), *versions, triton, *own])


def shape_of(qkv_BK3E: Tensor, rope: Tensor | None, num_heads: int, segments: Segments, call: Call) -> str:
    """Name of a row: lengths to the next 128 tokens, batches to the next power of 2.

    Of many segments whose lengths differ at every step the mean and the longest stand for all; where they are on the
    device, the tokens of the stream do.
    """
    batch, tokens = 2 ** math.ceil(math.log2(qkv_BK3E.shape[0])), qkv_BK3E.shape[1]
    if call.on_device:
        lengths = f"{len(segments)} in {_rounded(tokens)} to {_rounded(segments.longest)}"
    elif len(segments) <= 4:
        lengths = "+".join(str(_rounded(n)) for n in segments)
    else:
        lengths = f"{len(segments)} of {_rounded(tokens // len(segments))} to {_rounded(segments.longest)}"
    kind = "capacity" if call.on_device else "whole" if call.repeats else "lengths"
    words = [f"{call.dtype}".removeprefix("torch."), f"{num_heads}x{call.head_dim}", f"{batch} x {kind} {lengths}"]
    words += ["rope"] if rope is not None else []
    words += ["deterministic"] if torch.are_deterministic_algorithms_enabled() else []
    return ", ".join([*words, "backward" if call.grad else "forward"])


def _rounded(n: int) -> int:
    return -(-n // 128) * 128


def _kept(key: tuple[str, str], call: Call) -> Backend | None:
    """The backend of the table, if it is still there and supports the call."""
    row = TABLE.rows(key[0]).get(key[1])
    if row is None:
        return None
    found = STEADY if row["backend"] == STEADY.name else BACKENDS.get(row["backend"])
    return None if found is None or found.refusals(call) else found


def _measure(
    key: tuple[str, str], call: Call, qkv: Tensor, rope: Tensor | None, num_heads: int, segments: Segments
) -> Backend:
    able = candidates(call)
    if len(able) <= 1:
        return able[0] if able else STEADY
    try:
        want = _result(STEADY, qkv, rope, num_heads, segments)
        ms = {b.name: _milliseconds(b, qkv, rope, num_heads, segments, call.grad, want) for b in able}
    except torch.OutOfMemoryError:  # says nothing of a backend
        torch.cuda.empty_cache()
        return unmeasured(call)
    times = {b: t for b in able if (t := ms[b.name]) is not None}
    best = min(times, key=lambda b: times[b], default=STEADY)
    row: Row = {"backend": best.name, "ms": ms}
    _log.info("runtime.attention: auto takes %s for %s (ms: %s)", best.name, key[1], ms)
    TABLE.add(*key, row)
    return best


def _result(backend: Backend, qkv: Tensor, rope: Tensor | None, num_heads: int, segments: Segments) -> Tensor | None:
    """What a backend computes, without gradient; None where it fails."""
    try:
        with torch.no_grad():
            return applied(backend, qkv, rope, num_heads, segments, keep=True)
    except torch.OutOfMemoryError:
        raise
    except _FAILURES:
        return None


def _milliseconds(
    backend: Backend,
    qkv: Tensor,
    rope: Tensor | None,
    num_heads: int,
    segments: Segments,
    grad: bool,
    want: Tensor | None,
) -> float | None:
    """Device time of the quickest of a few passes; None for a backend that fails, or whose values are not ``want``."""
    got = _result(backend, qkv, rope, num_heads, segments)
    if got is None or (want is not None and not bool((got - want).abs().max() <= _TOLERANCE * want.abs().max())):
        return None
    x, unit = qkv.detach().clone().requires_grad_(grad), torch.ones_like(got)

    def once() -> Tensor:
        out = applied(backend, x, rope, num_heads, segments, keep=True)
        return torch.autograd.grad(out, x, unit)[0] if grad else out

    try:
        with torch.set_grad_enabled(grad), saved_tensors_hooks(_same, _same):  # not those of a checkpoint around this
            best = min(_device_ms(once, qkv.device) for _ in range(_PASSES))
            return best if bool(torch.isfinite(once()).all()) else None
    except torch.OutOfMemoryError:
        raise
    except _FAILURES:
        return None


def _same(x: Tensor) -> Tensor:
    return x


def _device_ms(once: Callable[[], Tensor], device: torch.device) -> float:
    """Time on the device, which is kept busy while the host launches, so that a slow host does not decide."""
    with torch.cuda.device(device):
        began, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda._sleep(_AHEAD)
        began.record()
        once()
        ended.record()
        torch.cuda.synchronize()
        return began.elapsed_time(ended)
