"""Attention within segments: several masks in one stream of tokens, each token seeing its own sample and mask only.

Legend: B batch, K tokens, H heads, d channels of a head; ``lengths`` are those of the segments along K, the same in
every sample. Where samples keep different numbers of tokens (``layers.Packed``), all lie in one stream, B = 1, and a
segment is one mask of one sample. Backends:

    sdpa      torch's scaled_dot_product_attention, one call per segment; any device
    varlen    torch.nn.attention.varlen, one call; CUDA, float16 and bfloat16
    xformers  memory_efficient_attention with a BlockDiagonalMask, one call; CUDA

``auto`` takes sdpa on a CPU and for one segment; on CUDA it times those that can serve, once per shape, and keeps the
fastest.
"""

from __future__ import annotations

import functools
import importlib.util
import time
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from vjepa_fast.errors import ConfigError
from vjepa_fast.layers.packed import Packed

_HALF = (torch.float16, torch.bfloat16)
_chosen = "auto"


def pieces(x: Tensor, mask: Tensor | Packed) -> Sequence[Tensor]:
    """The segments of ``x`` [B,K,...], the tokens of one mask: all of it, or one part per sample of a packed mask."""
    return x.split(mask.lengths, 1) if isinstance(mask, Packed) else (x,)


def sizes(mask: Tensor | Packed) -> Sequence[int]:
    """Lengths of the segments of one mask."""
    return mask.lengths if isinstance(mask, Packed) else (mask.shape[1],)


def tokens(mask: Tensor | Packed) -> Tensor:
    """int64 [B,K] or [1,M], the place of each token in its own sample's grid."""
    return mask.token if isinstance(mask, Packed) else mask.long()


class Changing:
    """Lengths of many segments, others at every step. The compiler sees an object, not numbers: see ``attention``."""

    def __init__(self, lengths: Sequence[int]):
        self.values = tuple(lengths)

    def __iter__(self):
        return iter(self.values)


def filler(length: int, multiple: int) -> int:
    """Tokens to add to a stream so that its length is a multiple; 0 if ``multiple`` is, else at least one.

    One at least, so that there is always a segment of them and the number of segments stays the same from step to step.
    """
    return multiple - length % multiple if multiple else 0


def _sdpa(q: Tensor, k: Tensor, v: Tensor, lengths: Sequence[int]) -> Tensor:
    # as of the predictor where nothing is truncated; a graph with symbolic lengths must not ask
    if len(lengths) > 1 and not torch.compiler.is_compiling() and len(set(lengths)) == 1:
        out = _sdpa(*(x.reshape(-1, lengths[0], *x.shape[2:]) for x in (q, k, v)), lengths[:1])
        return out.reshape(q.shape)
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    if len(lengths) == 1:
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2)
    parts = zip(*(x.split(list(lengths), 2) for x in (q, k, v)))
    return torch.cat([F.scaled_dot_product_attention(*part).transpose(1, 2) for part in parts], 1)


@functools.lru_cache(64)
def _bounds(batch: int, lengths: tuple[int, ...], device: torch.device) -> Tensor:
    """int32 [B*segments + 1]: where each segment begins in the stream of all samples."""
    return _sent(torch.tensor([0, *lengths * batch]).cumsum(0).to(torch.int32), device)


def _sent(x: Tensor, device: torch.device) -> Tensor:
    """``x`` on the device. Lengths are new at every step: from pinned memory, since else each would be waited for."""
    return x.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else x.to(device)


def _varlen(q: Tensor, k: Tensor, v: Tensor, lengths: Sequence[int]) -> Tensor:
    from torch.nn.attention.varlen import varlen_attn

    bounds = _bounds(q.shape[0], tuple(lengths), q.device)
    longest = max(lengths)
    flat = (x.flatten(0, 1) for x in (q, k, v))
    return varlen_attn(*flat, bounds, bounds, longest, longest).view_as(q)


@functools.lru_cache(64)
def _block_diagonal(batch: int, lengths: tuple[int, ...], device: torch.device):
    from xformers.ops.fmha.attn_bias import BlockDiagonalMask

    mask = BlockDiagonalMask.from_seqlens(list(lengths) * batch, device=torch.device("cpu"))
    on_device = _sent(mask.q_seqinfo.seqstart, device)
    for info in (mask.q_seqinfo, mask.k_seqinfo):  # as many keys as queries
        info.seqstart = on_device
    return mask


def _xformers(q: Tensor, k: Tensor, v: Tensor, lengths: Sequence[int]) -> Tensor:
    from xformers.ops import memory_efficient_attention

    flat = (x.flatten(0, 1)[None] for x in (q, k, v))
    bias = _block_diagonal(q.shape[0], tuple(lengths), q.device)
    return memory_efficient_attention(*flat, attn_bias=bias)[0].view_as(q)


_BACKENDS: dict[str, Callable[..., Tensor]] = {"varlen": _varlen, "xformers": _xformers, "sdpa": _sdpa}
NAMES = ("auto", *_BACKENDS)


def objections(name: str, q: Tensor) -> list[str]:
    """Why backend ``name`` cannot serve queries like ``q``; empty if it can."""
    if name == "sdpa":
        return []
    reasons = [] if q.is_cuda else [f"it needs CUDA, the tokens are on {q.device.type}"]
    if name == "varlen":
        if q.dtype not in _HALF:
            reasons.append(f"it takes float16 and bfloat16, got {str(q.dtype).removeprefix('torch.')}")
        if importlib.util.find_spec("torch.nn.attention.varlen") is None:
            reasons.append(f"torch {torch.__version__} has no torch.nn.attention.varlen")
    elif importlib.util.find_spec("xformers") is None:
        reasons.append("the package xformers is not installed")
    return reasons


def check(name: str, device: torch.device, dtype: torch.dtype) -> None:
    """Refuse a backend that cannot run on this device and dtype (ConfigError)."""
    if name not in NAMES:
        raise ConfigError(f"runtime.attention: {name!r}; accepted: {', '.join(NAMES)}")
    if name != "auto" and (reasons := objections(name, torch.empty(0, dtype=dtype, device=device))):
        raise ConfigError(f"runtime.attention: {name} cannot serve: {'; '.join(reasons)}")


def choose(name: str) -> None:
    """Use backend ``name`` (see the module) for all attention of this process.

    Raises:
        ConfigError: no such backend.
    """
    global _chosen
    if name not in NAMES:
        raise ConfigError(f"runtime.attention: {name!r}; accepted: {', '.join(NAMES)}")
    _chosen = name


def attention(q: Tensor, k: Tensor, v: Tensor, lengths: Sequence[int] | Changing | None = None) -> Tensor:
    """Softmax attention of each segment's tokens among themselves.

    Args:
        q, k, v: [B,K,H,d]. lengths: of the segments, adding up to K; None: one segment. ``Changing`` ones are attended
            to outside of a compiled graph, which would have to be made anew at every step.

    Returns:
        [B,K,H,d].

    Raises:
        ConfigError: the chosen backend cannot serve; the message has all its reasons.
    """
    if isinstance(lengths, Changing):
        return _uncompiled(q, k, v, lengths)
    return _attention(q, k, v, (q.shape[1],) if lengths is None else tuple(lengths))


@torch.compiler.disable
def _uncompiled(q: Tensor, k: Tensor, v: Tensor, lengths: Changing) -> Tensor:
    return _attention(q, k, v, lengths.values)


def _attention(q: Tensor, k: Tensor, v: Tensor, lengths: tuple[int, ...]) -> Tensor:
    name = _chosen
    if name == "auto":
        name = "sdpa" if len(lengths) == 1 or not q.is_cuda else _fastest(q, k, v, lengths)
    elif reasons := objections(name, q):
        raise ConfigError(f"runtime.attention: {name} cannot serve: {'; '.join(reasons)}")
    return _BACKENDS[name](q, k, v, lengths)


_measured: dict[tuple, str] = {}


def _fastest(q: Tensor, k: Tensor, v: Tensor, lengths: tuple[int, ...]) -> str:
    """The backend that is quickest forward and backward on tokens of this shape (lengths to the next 128).

    Of many segments, whose lengths differ at every step, the mean and the longest stand for all.
    """
    if torch.compiler.is_compiling():
        return "sdpa"  # and no look at the lengths, which would make a graph for each
    told = lengths if len(lengths) <= 4 else (len(lengths) * 128, sum(lengths) // len(lengths), max(lengths))
    key = (q.device, q.dtype, q.shape[0], *q.shape[2:], *(-(-n // 128) for n in told))
    if key not in _measured:
        if torch.cuda.is_current_stream_capturing():
            return "sdpa"  # no time to measure now
        able = [name for name in _BACKENDS if not objections(name, q)]
        _measured[key] = min(able, key=lambda name: _seconds(_BACKENDS[name], q, k, v, lengths))
    return _measured[key]


def _seconds(backend, q: Tensor, k: Tensor, v: Tensor, lengths: tuple[int, ...], repeats: int = 3) -> float:
    """Time of the quickest of a few passes; infinite for a backend that fails."""
    best = float("inf")
    with torch.enable_grad():
        parts = [x.detach().requires_grad_() for x in (q, k, v)]
        try:
            for _ in range(repeats):
                torch.cuda.synchronize(q.device)
                began = time.perf_counter()
                torch.autograd.grad(backend(*parts, lengths).sum(), parts)
                torch.cuda.synchronize(q.device)
                best = min(best, time.perf_counter() - began)
        except (RuntimeError, NotImplementedError, ValueError):
            return float("inf")
    return best
