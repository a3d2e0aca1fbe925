"""``torch.nn.attention.varlen``."""

from __future__ import annotations

import importlib.util

import torch
from torch import Tensor

from vjepa_fast.layers.attention.base import Backend, Call, Segments, needs_cuda, register

_HALF = (torch.float16, torch.bfloat16)
_THERE = importlib.util.find_spec("torch.nn.attention.varlen") is not None


class Varlen(Backend):
    """CUDA, float16 and bfloat16."""

    name = "varlen"
    graph = False
    on_device = True

    def objections(self, call: Call) -> list[str]:
        """Why this backend does not support the call."""
        reasons = needs_cuda(call)
        if call.dtype not in _HALF:
            reasons.append(f"it takes float16 and bfloat16, got {str(call.dtype).removeprefix('torch.')}")
        if not _THERE:
            reasons.append(f"torch {torch.__version__} has no torch.nn.attention.varlen")
        return reasons

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, segments: Segments) -> Tensor:
        """One call for all segments of all samples."""
        from torch.nn.attention.varlen import varlen_attn

        offsets, longest = segments.offsets(q.shape[0], q.device), segments.longest
        q_, k_, v_ = (x.flatten(0, 1) for x in (q, k, v))
        out = varlen_attn(q_, k_, v_, offsets, offsets, longest, longest)
        assert isinstance(out, Tensor)  # more is returned only where it is asked for
        return out.view_as(q)


register(Varlen())
