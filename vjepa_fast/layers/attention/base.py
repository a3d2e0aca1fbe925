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
import torch.nn.functional as F
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


class DeviceSegments(Segments):
    """Segments whose lengths are known to the device alone: the host knows their number, and how long one may be.

    Args:
        sizes: int64 [S], adding up to the tokens of the stream; a segment may be empty.
        longest: the most tokens that a segment may have.
    """

    def __init__(self, sizes: Tensor, longest: int):
        self.sizes, self._longest = sizes, longest

    def __len__(self) -> int:
        return self.sizes.shape[0]

    @property
    def lengths(self) -> tuple[int, ...]:  # pyright: ignore[reportIncompatibleVariableOverride]  # never read, by design
        """Refused: to know them the host would have to wait."""
        raise TypeError("the lengths of these segments are on the device")

    @property
    def longest(self) -> int:
        """The most tokens that a segment may have."""
        return self._longest

    @functools.cached_property
    def _offsets(self) -> Tensor:
        return F.pad(self.sizes.cumsum(0), (1, 0)).to(torch.int32)

    def offsets(self, batch: int, device: torch.device) -> Tensor:
        """int32 [S + 1]: where each segment begins, and the end. One stream only; computed on the device."""
        if batch != 1:
            raise ValueError(f"segments with lengths on the device: expected one stream, got a batch of {batch}")
        return self._offsets

    @functools.cached_property
    def rows(self) -> Tensor:
        """int64 [S, longest], the rows of the stream in each segment; past its end the last one again."""
        place = torch.arange(self.longest, device=self.sizes.device)
        starts = self.sizes.cumsum(0) - self.sizes
        last = torch.minimum(place, (self.sizes - 1).clamp(min=0)[:, None])
        return (starts[:, None] + last).clamp(max=self.sizes.sum() - 1)

    @functools.cached_property
    def seen(self) -> Tensor:
        """Bool [S, longest], False past the end of a segment. An empty one has one entry, which nobody reads."""
        return torch.arange(self.longest, device=self.sizes.device) < self.sizes.clamp(min=1)[:, None]

    def slots(self, tokens: int) -> Tensor:
        """int64 [K], for each of the stream's K ``tokens`` the entry of ``rows``, flattened, that holds it."""
        row = torch.arange(tokens, device=self.sizes.device)
        ends = self.sizes.cumsum(0)
        segment = torch.searchsorted(ends, row, right=True)
        return segment * self.longest + row - (ends - self.sizes)[segment]


Lengths = Sequence[int] | Segments | None  # what `attend` takes


@functools.lru_cache(64)
def _offsets(batch: int, lengths: tuple[int, ...], device: torch.device) -> Tensor:
    found = torch.tensor([0, *lengths * batch]).cumsum(0).to(torch.int32)
    # from pinned memory: lengths are new at every step, and each copy would be waited for
    return found.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else found.to(device)


@dataclass(frozen=True)
class Call:
    """What a backend is asked whether it supports: ``device`` and ``dtype`` of q, k and v, d and S.

    ``on_device``: the segments are `DeviceSegments`.
    """

    device: torch.device
    dtype: torch.dtype
    head_dim: int
    segments: int = 1
    on_device: bool = False


class Backend(ABC):
    """A way to compute attention. To add one: a module that registers an instance of a subclass (`register`).

    Attributes:
        name: in ``runtime.attention``.
        graph: calls can be part of a compiled graph or a captured CUDA graph. False where something is made on the
            host for them, as `Segments.offsets` is: they then run between compiled graphs.
        on_device: calls may have `DeviceSegments` (``runtime.capacity_quantum``).
    """

    name: ClassVar[str]
    graph: ClassVar[bool] = True
    on_device: ClassVar[bool] = False

    def refusals(self, call: Call) -> list[str]:
        """All `objections`, and that of a backend that has to know the lengths of segments on the host."""
        unknown = call.on_device and not self.on_device
        text = "it needs the lengths of segments on the host (set runtime.capacity_quantum=0)"
        return self.objections(call) + ([text] if unknown else [])

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
