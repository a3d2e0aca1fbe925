"""Our own Triton kernels (`ops.packed_attention`): rotary positions inside, filler written as zeros."""

from __future__ import annotations

import torch
from torch import Tensor

from vjepa_fast import ops
from vjepa_fast.layers.attention.base import Backend, Call, DeviceSegments, Segments, register
from vjepa_fast.ops import _triton
from vjepa_fast.ops.packed_attention import width_objections


class Triton(Backend):
    """Our own Triton kernels with rotary positions inside; heads of up to 128 channels, 64 in float32."""

    name = "triton"
    implementation = "triton"
    cuda = True
    dtypes = _triton.FLOATS
    capability = (8, 0)
    on_device = True
    graph = False
    whole_graph = True
    capture = True
    deterministic = "always"
    takes_rope = True

    def objections(self, call: Call) -> list[str]:
        """Why this backend does not support the call."""
        reasons = super().objections(call) + width_objections(call.dtype, call.head_dim)
        if (chosen := ops.current_backend()) not in ("auto", "triton"):
            reasons.append(f"VJEPA_FAST_BACKEND={chosen} leaves no choice of Triton kernels")
        return reasons + (_triton.objections() if call.device.type == "cuda" else [])

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, segments: Segments) -> Tensor:
        """One call for all segments of all samples. Copies its inputs side by side, as `packed` reads them."""
        qkv = torch.stack((q, k, v), 2).flatten(2)
        return self.packed(qkv, None, q.shape[2], segments).view_as(q)

    def packed(self, qkv_BK3E: Tensor, rope: Tensor | None, num_heads: int, segments: Segments) -> Tensor:
        """One call for all segments of all samples, from qkv as it is: [B,K,3*E] -> [B,K,E]."""
        b, k, _ = qkv_BK3E.shape
        if isinstance(segments, DeviceSegments) or len(segments) > 1:
            offsets = segments.offsets(b, qkv_BK3E.device)
        else:  # also part of a graph
            offsets = torch.arange(b + 1, dtype=torch.int32, device=qkv_BK3E.device) * k
        return ops.packed_attention(qkv_BK3E, rope, offsets, num_heads)


register(Triton())
