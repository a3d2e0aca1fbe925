"""PyTorch's ``scaled_dot_product_attention``, on any device."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from vjepa_fast.layers.attention.base import Backend, DeviceSegments, Segments, register


class Sdpa(Backend):
    """Supports every call."""

    name = "sdpa"
    on_device = True

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, segments: Segments) -> Tensor:
        """One call per segment; segments of one length go as one batch, and those of unknown ones as one padded batch.

        That computes each of the latter at its longest: a way that works everywhere, not a fast one.
        """
        if isinstance(segments, DeviceSegments):
            return _padded(q, k, v, segments)
        lengths = segments.lengths
        # as of the predictor where nothing is truncated; a graph with symbolic lengths must not ask
        if len(lengths) > 1 and not torch.compiler.is_compiling() and len(set(lengths)) == 1:
            q_, k_, v_ = (x.reshape(-1, lengths[0], *x.shape[2:]) for x in (q, k, v))
            return _whole(q_, k_, v_).reshape(q.shape)
        if len(lengths) == 1:
            return _whole(q, k, v)
        parts = zip(*(x.split(list(lengths), 1) for x in (q, k, v)))
        return torch.cat([_whole(*part) for part in parts], 1)


def _whole(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, mask).transpose(1, 2)


def _padded(q: Tensor, k: Tensor, v: Tensor, segments: DeviceSegments) -> Tensor:
    rows = segments.rows  # past its end a segment repeats its own last row
    out = _whole(q[0, rows], k[0, rows], v[0, rows], segments.seen[:, None, None])
    return out.flatten(0, 1).index_select(0, segments.slots(q.shape[1]))[None]


SDPA = register(Sdpa())
