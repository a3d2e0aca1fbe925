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
        return needs_cuda(call) + ([] if _INSTALLED else ["the package xformers is not installed"])

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, segments: Segments) -> Tensor:
        """One call for all segments of all samples."""
        from xformers.ops import memory_efficient_attention

        flat = (x.flatten(0, 1)[None] for x in (q, k, v))
        bias = _block_diagonal(q.shape[0], segments.lengths, q.device)
        return memory_efficient_attention(*flat, attn_bias=bias)[0].view_as(q)


@functools.lru_cache(64)
def _block_diagonal(batch: int, lengths: tuple[int, ...], device: torch.device):
    from xformers.ops.fmha.attn_bias import BlockDiagonalMask

    mask = BlockDiagonalMask.from_seqlens(list(lengths) * batch, device=torch.device("cpu"))
    for info in (mask.q_seqinfo, mask.k_seqinfo):  # as many keys as queries
        info.seqstart = Segments(lengths).offsets(batch, device)
    return mask


register(Xformers())
