"""``memory_efficient_attention`` of the package xformers with a ``BlockDiagonalMask``: one call for all segments."""

from __future__ import annotations

import functools
import importlib.util

import torch
from torch import Tensor

from vjepa_fast.layers.attention.base import Backend, Call, Segments, needs_cuda, register

_INSTALLED = importlib.util.find_spec("xformers") is not None


class Xformers(Backend):
    """CUDA."""

    name = "xformers"
    graph = False

    def objections(self, call: Call) -> list[str]:
        """Why this backend does not support the call."""
        reasons = needs_cuda(call) + ([] if _INSTALLED else ["the package xformers is not installed"])
        return reasons or list(_refusals(call.device, call.dtype, call.head_dim))

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, segments: Segments) -> Tensor:
        """One call for all segments of all samples."""
        from xformers.ops import memory_efficient_attention

        flat = (x.flatten(0, 1)[None] for x in (q, k, v))
        bias = _block_diagonal(q.shape[0], segments.lengths, q.device)
        return memory_efficient_attention(*flat, attn_bias=bias)[0].view_as(q)


@functools.lru_cache(64)
def _refusals(device: torch.device, dtype: torch.dtype, head_dim: int) -> tuple[str, ...]:
    """What a small call says: a wheel that was built for another CUDA than torch imports and has no operator."""
    from xformers.ops import memory_efficient_attention

    x = torch.zeros(1, 16, 1, head_dim, device=device, dtype=dtype)
    try:
        memory_efficient_attention(x, x, x, attn_bias=_block_diagonal(1, (8, 8), device))
    except (NotImplementedError, ValueError) as error:
        return (f"xformers has no operator for it: {' '.join(str(error).split())[:300]}",)
    return ()


@functools.lru_cache(64)
def _block_diagonal(batch: int, lengths: tuple[int, ...], device: torch.device):
    from xformers.ops.fmha.attn_bias import BlockDiagonalMask

    mask = BlockDiagonalMask.from_seqlens(list(lengths) * batch, device=torch.device("cpu"))
    for info in (mask.q_seqinfo, mask.k_seqinfo):  # as many keys as queries
        info.seqstart = Segments(lengths).offsets(batch, device)
    return mask


register(Xformers())
