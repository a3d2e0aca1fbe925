"""Attention within the segments of a stream of tokens: `attend`, and its backends, one file each.

Several masks, or the samples of a mask that keep different numbers of tokens (`layers.packed.Packed`), lie side by
side in one stream, and each token sees its own segment only. ``runtime.attention`` forces a backend, or the quickest is
measured (`choice`). The model holds the choice (`layers.block.use_attention`), not the process.

Legend: B batch, K tokens, E embed_dim, H heads, d = E/H channels of a head.
"""

from __future__ import annotations

import torch
from torch import Tensor

from vjepa_fast.errors import ConfigError
from vjepa_fast.layers.attention import eager
from vjepa_fast.layers.attention.base import (
    BACKENDS,
    Backend,
    Call,
    DeviceSegments,
    FrameCausal,
    Lengths,
    Segments,
    needs_cuda,
    register,
)
from vjepa_fast.layers.attention.choice import for_whole_grids
from vjepa_fast.layers.attention.eager import require
from vjepa_fast.layers.attention.kernels import IMPLEMENTATIONS, implementation, implementations
from vjepa_fast.layers.attention.rotary import applied
from vjepa_fast.layers.attention.sdpa import SDPA, STEADY
from vjepa_fast.registry import suggestion

__all__ = [
    "BACKENDS",
    "IMPLEMENTATIONS",
    "SDPA",
    "Backend",
    "Call",
    "DeviceSegments",
    "FrameCausal",
    "Lengths",
    "Segments",
    "attend",
    "find",
    "for_whole_grids",
    "implementation",
    "implementations",
    "needs_cuda",
    "register",
    "require",
]


def find(name: str) -> Backend | None:
    """The backend of ``runtime.attention: name``; None for ``auto``.

    Raises:
        ConfigError: there is no such backend.
    """
    if name == "auto":
        return None
    if name not in BACKENDS:
        known = ["auto", *BACKENDS]
        hint = suggestion(name, known)
        raise ConfigError(f"runtime.attention: unknown attention backend {name!r}; accepted: {', '.join(known)}{hint}")
    return BACKENDS[name]


def attend(
    qkv_BK3E: Tensor, rope: Tensor | None, num_heads: int, lengths: Lengths = None, backend: Backend | None = None
) -> Tensor:
    """Softmax attention of each segment's tokens among themselves, q and k rotated by ``rope``.

    Args:
        qkv_BK3E: queries, keys and values, packed.
        num_heads: H.
        rope: None, or the rows of ``models.rope.rope_table`` of these tokens, with or without a leading B.
        lengths: of the segments along K, the same in every sample, adding up to K; None: one segment, a whole grid
            whose K repeats from step to step. `Segments`, which may change at every step, are attended to outside of a
            compiled graph.
        backend: None: the fastest that supports the call. On a CPU that is ``sdpa``; elsewhere those that can are
            measured, once per shape (`choice.fastest`). In a compiled graph, where nothing can be measured, it is
            torch's own choice among all kernels but those of cuDNN, which would build a plan for every new length.

    Returns:
        [B,K,E] of qkv's dtype.

    Raises:
        ConfigError: ``backend`` does not support the call; the message has all its reasons.
    """
    if not torch.compiler.is_compiling():
        return eager.run(qkv_BK3E, rope, num_heads, lengths, backend)
    inside = backend is None or backend.graph or (lengths is None and backend.whole_graph)
    if isinstance(lengths, Segments) or not inside:
        return eager.graph_break(qkv_BK3E, rope, num_heads, lengths, backend)
    segments = Segments((qkv_BK3E.shape[1],) if lengths is None else lengths)
    if backend is None:
        backend = STEADY if qkv_BK3E.is_cuda else SDPA
    return applied(backend, qkv_BK3E, rope, num_heads, segments)
