"""``memory_efficient_attention`` of the package xformers with a ``BlockDiagonalMask``: one call for all segments.

Its wheels hold no attention kernels of their own: FlashAttention 3 runs where the package flash_attn_3 is installed,
else PyTorch's flash kernels (xformers calls them ``fa2F-pt``), and PyTorch's cutlass kernels for what those refuse.
The wheel is built for CUDA 12: beside a torch for CUDA 13 its library finds no ``libcudart.so.12``, which the package
nvidia-cuda-runtime-cu12 has and which is loaded here before the import.
"""

from __future__ import annotations

import ctypes
import functools
import logging
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vjepa_fast.layers.attention.base import Backend, Call, Segments, installed, register

_RUNTIME, _LIBRARY = "nvidia-cuda-runtime-cu12", "libcudart.so.12"


class Xformers(Backend):
    """``xformers.ops.memory_efficient_attention``, which runs PyTorch's flash kernels or those of flash_attn_3."""

    name = "xformers"
    cuda = True
    capability = (8, 0)
    graph = False
    capture = True

    def __init__(self) -> None:
        self.implementation = "fa3" if installed("flash_attn_3") else "flash"

    def objections(self, call: Call) -> list[str]:
        """Why this backend does not support the call."""
        reasons = super().objections(call)
        if not installed("xformers"):
            return [*reasons, "the package xformers is not installed (pip install xformers nvidia-cuda-runtime-cu12)"]
        return reasons or list(_refusals(call.device, call.dtype, call.head_dim))

    def version(self) -> str:
        """Of the package, with its own name of the kernels that it runs; empty where it is not installed."""
        try:
            kernels = "fa3F" if self.implementation == "fa3" else "fa2F-pt"
            return f"xformers {metadata.version('xformers')} ({kernels})"
        except metadata.PackageNotFoundError:
            return ""

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, segments: Segments) -> Tensor:
        """One call for all segments of all samples."""
        attention = _ops().memory_efficient_attention
        if len(segments) == 1:
            return attention(q, k, v)
        flat = (x.flatten(0, 1)[None] for x in (q, k, v))
        bias = _block_diagonal(q.shape[0], segments.lengths, q.device)
        return attention(*flat, attn_bias=bias)[0].view_as(q)


@functools.cache
def _ops() -> Any:
    """The module xformers.ops, with the CUDA runtime that its library asks for loaded before."""
    load_runtime()
    import xformers.ops

    return xformers.ops


@functools.cache
def load_runtime() -> str:
    """Load ``libcudart.so.12`` for all libraries of the process. Returns why it could not; empty if it is there."""
    try:
        ctypes.CDLL(_LIBRARY, mode=ctypes.RTLD_GLOBAL)  # torch for CUDA 12 has brought it, or the system has it
        return ""
    except OSError:
        pass
    try:
        files = metadata.files(_RUNTIME) or ()
    except metadata.PackageNotFoundError:
        return f"{_LIBRARY} is missing: pip install {_RUNTIME}"
    for path in (Path(str(f.locate())) for f in files if f.name == _LIBRARY):
        try:
            ctypes.CDLL(str(path), mode=ctypes.RTLD_GLOBAL)
            return ""
        except OSError as error:
            return f"{_LIBRARY} of {_RUNTIME} cannot be loaded: {error}"
    return f"{_RUNTIME} is installed without {_LIBRARY}: pip install --force-reinstall {_RUNTIME}"


@functools.lru_cache(64)
def _refusals(device: torch.device, dtype: torch.dtype, head_dim: int) -> tuple[str, ...]:
    """What a small call says: a library that could not be loaded imports and has no operator."""
    logging.getLogger("xformers").setLevel(logging.ERROR)  # what it warns of is said here
    x = torch.zeros(1, 16, 1, head_dim, device=device, dtype=dtype)
    try:
        _ops().memory_efficient_attention(x, x, x, attn_bias=_block_diagonal(1, (8, 8), device))
    except (NotImplementedError, ValueError) as error:
        missing = load_runtime()
        said = f"xformers has no operator for it: {' '.join(str(error).split())[:300]}"
        return (said, missing) if missing else (said,)
    except Exception as error:  # flash-attn-4, for one, looks to xformers like an older flash_attn that is broken
        return (f"xformers cannot be imported: {type(error).__name__}: {' '.join(str(error).split())[:200]}",)
    return ()


@functools.lru_cache(64)
def _block_diagonal(batch: int, lengths: tuple[int, ...], device: torch.device) -> Any:
    from xformers.ops.fmha.attn_bias import BlockDiagonalMask

    mask = BlockDiagonalMask.from_seqlens(list(lengths) * batch, device=torch.device("cpu"))
    for info in (mask.q_seqinfo, mask.k_seqinfo):  # as many keys as queries
        info.seqstart = Segments(lengths).offsets(batch, device)
    return mask


register(Xformers())
