"""Attention outside of compiled graphs, and where one has to stop for it (`graph_break`)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from vjepa_fast.errors import ConfigError
from vjepa_fast.layers.attention.base import Backend, Call, Lengths, Segments
from vjepa_fast.layers.attention.choice import call_of, fastest
from vjepa_fast.layers.attention.rotary import applied

graph_break: Callable[..., Tensor]  # `run`, never part of a compiled graph


def require(backend: Backend, call: Call) -> None:
    """Refuse a call that the backend does not support (ConfigError with all its reasons)."""
    if reasons := backend.refusals(call):
        raise ConfigError(
            f"runtime.attention: {backend.name} is not supported here: {'; '.join(reasons)}; use runtime.attention=auto"
        )


def run(
    qkv_BK3E: Tensor, rope: Tensor | None, num_heads: int, lengths: Lengths = None, backend: Backend | None = None
) -> Tensor:
    """`attend` outside of graphs: the backend is chosen, or checked, for these tokens."""
    whole = lengths is None
    segments = lengths if isinstance(lengths, Segments) else Segments((qkv_BK3E.shape[1],) if whole else lengths)
    if backend is None:
        backend = fastest(qkv_BK3E, rope, num_heads, segments, whole)
    else:
        require(backend, call_of(qkv_BK3E, num_heads, segments))
    return applied(backend, qkv_BK3E, rope, num_heads, segments)


def __getattr__(name: str) -> Any:
    """`graph_break`, made when a graph is first compiled: ``torch.compiler.disable`` imports the compiler, a second."""
    if name != "graph_break":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    found = globals()[name] = torch.compiler.disable(run)
    return found
