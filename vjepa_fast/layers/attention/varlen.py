"""Variable-length attention of PyTorch: one call for all segments of all samples.

``torch.nn.attention.varlen.varlen_attn`` decides by itself between two operators: on compute capability 9 and 10 with
cuDNN 9.18 or newer it runs cuDNN for segments over 128 tokens, elsewhere flash, and no argument or switch of torch 2.14
pins it (pytorch#187770). Here the operators are called by their own names, so that what runs is what is named.
"""

from __future__ import annotations

import torch
from torch import Tensor

from vjepa_fast.layers.attention.base import Backend, Call, Segments, capability, register
from vjepa_fast.layers.attention.sdpa import HALF


class Varlen(Backend):
    """PyTorch's flash kernels (FlashAttention 2) with offsets of segments, as ``aten::_flash_attention_forward``."""

    name = "varlen"
    implementation = "flash"
    cuda = True
    dtypes = HALF
    head_dims = (8, 256)
    capability = (8, 0)
    graph = False  # offsets of several lengths are made on the host
    whole_graph = capture = True
    on_device = True

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, segments: Segments) -> Tensor:
        """One call for all segments of all samples."""
        offsets, longest = segments.offsets(q.shape[0], q.device), segments.longest
        q_, k_, v_ = (x.flatten(0, 1) for x in (q, k, v))
        return self._call(q_, k_, v_, offsets, longest).view_as(q)

    def _call(self, q: Tensor, k: Tensor, v: Tensor, offsets: Tensor, longest: int) -> Tensor:
        # dropout 0, not causal, no debug mask
        return torch.ops.aten._flash_attention_forward(q, k, v, offsets, offsets, longest, longest, 0.0, False, False)[
            0
        ]


class VarlenCudnn(Varlen):
    """cuDNN's kernels with offsets of segments, as ``aten::_cudnn_attention_forward``; a plan for each new shape.

    It asks for what torch's own ``varlen_attn`` asks for before it takes cuDNN. On an H100 with torch 2.11 and cuDNN
    9.19 the operator's backward pass broke the CUDA context (illegal instruction, illegal address), after which nothing
    runs in that process: refused there, and under later versions, where nobody has tried it, only taken by name.
    """

    name = "varlen_cudnn"
    implementation = "cudnn"
    head_dims = (8, 128)
    capability = (9, 0)
    deterministic = "never"
    plans = True
    timed = False
    since = "2.12"  # of torch; with 2.11 it was seen to fail
    shortest = 128  # cuDNN takes offsets where the longest segment has more tokens

    def objections(self, call: Call) -> list[str]:
        """Why this backend does not support the call."""
        reasons, found = super().objections(call), torch.backends.cudnn.version() or 0
        if torch.__version__ < self.since:  # by version, not by letters: torch has a type for it
            reasons.append(f"it breaks the process before torch {self.since}, this is {torch.__version__}")
        if found < 91800:
            reasons.append(f"it needs cuDNN 9.18 or newer, torch has {found}")
        if (device := capability(call.device)) is not None and device[0] > 10:
            reasons.append(f"it needs compute capability 9 or 10, the device has {device[0]}.{device[1]}")
        if 0 < call.longest <= self.shortest:
            reasons.append(f"it takes segments that may have over {self.shortest} tokens, got at most {call.longest}")
        return reasons

    def version(self) -> str:
        """Of torch and cuDNN."""
        return f"{super().version()}, cuDNN {torch.backends.cudnn.version()}"

    def _call(self, q: Tensor, k: Tensor, v: Tensor, offsets: Tensor, longest: int) -> Tensor:
        sums = torch.is_grad_enabled()  # of exponentials, kept for the backward pass
        out = torch.ops.aten._cudnn_attention_forward(q, k, v, None, offsets, offsets, longest, longest, sums)
        return out[0]


register(Varlen())
register(VarlenCudnn())
