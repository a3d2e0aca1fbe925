"""PyTorch's ``scaled_dot_product_attention``, on any device."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from vjepa_fast.layers.attention.base import Backend, Segments, register


class Sdpa(Backend):
    """Supports every call."""

    name = "sdpa"

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, segments: Segments) -> Tensor:
        """One call per segment; segments of one length go as one batch."""
        lengths = segments.lengths
        # as of the predictor where nothing is truncated; a graph with symbolic lengths must not ask
        if len(lengths) > 1 and not torch.compiler.is_compiling() and len(set(lengths)) == 1:
            each = (x.reshape(-1, lengths[0], *x.shape[2:]).transpose(1, 2) for x in (q, k, v))
            return F.scaled_dot_product_attention(*each).transpose(1, 2).reshape(q.shape)
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        if len(lengths) == 1:
            return F.scaled_dot_product_attention(q, k, v).transpose(1, 2)
        parts = zip(*(x.split(list(lengths), 2) for x in (q, k, v)))
        return torch.cat([F.scaled_dot_product_attention(*part).transpose(1, 2) for part in parts], 1)


SDPA = register(Sdpa())
