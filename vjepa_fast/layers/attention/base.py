"""What an attention backend is, and where the backends are registered.

Legend: B batch, K tokens, H heads, d channels of a head, S segments.
"""

from __future__ import annotations

import functools
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar, TypeVar

import torch
from torch import Tensor

from vjepa_fast.registry import Registry


class Segments:
    """Lengths of S segments side by side in a stream of K tokens, each of which attends to itself only.

    Given to `attend` in place of plain lengths, they may differ at every step under ``torch.compile``: the compiler
    sees an object, not numbers, and leaves the graph for the attention instead of compiling it anew.
    """

    def __init__(self, lengths: Sequence[int]):
        self.lengths = tuple(lengths)

    def __iter__(self) -> Iterator[int]:
        return iter(self.lengths)

    def __len__(self) -> int:
        return len(self.lengths)

    @property
    def longest(self) -> int:
        """The most tokens of a segment."""
        return max(self.lengths)

    def offsets(self, batch: int, device: torch.device) -> Tensor:
        """int32 [batch*S + 1]: where each segment begins when the samples of a batch follow one another, and the end.

        Made on the host, so not in a graph; the device is not waited for.
        """
        return _offsets(batch, self.lengths, device)


Lengths = Sequence[int] | Segments | None  # what `attend` takes


@functools.lru_cache(64)
def _offsets(batch: int, lengths: tuple[int, ...], device: torch.device) -> Tensor:
    found = torch.tensor([0, *lengths * batch]).cumsum(0).to(torch.int32)
    # from pinned memory: lengths are new at every step, and each copy would be waited for
    return found.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else found.to(device)


@dataclass(frozen=True)
class Call:
    """What a backend is asked whether it supports: ``device`` and ``dtype`` of q, k and v, d and S."""

    device: torch.device
    dtype: torch.dtype
    head_dim: int
    segments: int = 1


class Backend(ABC):
    """A way to compute attention. To add one: a module that registers an instance of a subclass (`register`).

    Attributes:
        name: in ``runtime.attention``.
        graph: calls can be part of a compiled graph or a captured CUDA graph. False where something is made on the
            host for them, as `Segments.offsets` is: they then run between compiled graphs.
    """

    name: ClassVar[str]
    graph: ClassVar[bool] = True

    def objections(self, call: Call) -> list[str]:
        """Why this backend does not support the call, every reason; empty if it does."""
        return []

    @abstractmethod
    def __call__(self, q: Tensor, k: Tensor, v: Tensor, segments: Segments) -> Tensor:
        """softmax(q k^T / sqrt(d)) v within each segment: [B,K,H,d] each, any strides -> [B,K,H,d]. Differentiable."""

    def __reduce__(self):
        return _registered, (self.name,)  # a copied model has the same backend, not a copy of it


def _check(name: str, backend: Backend) -> None:
    if not isinstance(backend, Backend):
        raise TypeError(f"attention backend {name!r}: expected an instance of Backend, got {backend!r}")


BACKENDS: Registry[Backend] = Registry("attention backend", package="vjepa_fast.layers.attention", check=_check)
B = TypeVar("B", bound=Backend)


def _registered(name: str) -> Backend:
    return BACKENDS[name]


def register(backend: B) -> B:
    """Make a backend usable by its name; returns it."""
    BACKENDS.add(backend.name, backend)
    return backend


def needs_cuda(call: Call) -> list[str]:
    """The objection of a backend that runs on CUDA only, as a list."""
    return [] if call.device.type == "cuda" else [f"it needs CUDA, the tokens are on {call.device.type}"]
