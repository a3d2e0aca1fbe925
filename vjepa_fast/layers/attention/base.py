"""What an attention backend is, and where the backends are registered.

Legend: B batch, K tokens, H heads, d channels of a head, S segments.
"""

from __future__ import annotations

import functools
import importlib.util
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
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

        Of one segment computed on the device, of several made on the host, so not in a graph; the device is not waited
        for.
        """
        if len(self.lengths) == 1:
            (length,) = self.lengths
            return torch.arange(0, batch * length + 1, length, dtype=torch.int32, device=device)
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
    """What a backend is asked whether it supports.

    Attributes:
        device, dtype: of q, k and v.
        head_dim: d.
        segments: S.
        on_device: the segments are `DeviceSegments`.
        grad: a backward pass follows.
        repeats: the same shapes come again at other steps, as those of whole grids and of streams of fixed capacity do;
            False for lengths that are new at every step.
        stride: elements between two channels of a head.
        longest: the most tokens that a segment may have; 0: not known yet.
    """

    device: torch.device
    dtype: torch.dtype
    head_dim: int
    segments: int = 1
    on_device: bool = False
    grad: bool = False
    repeats: bool = True
    stride: int = 1
    longest: int = 0


class Backend(ABC):
    """A way to compute attention. To add one: a module that registers an instance of a subclass (`register`).

    What a backend supports is declared here and nowhere else.

    Attributes:
        name: in ``runtime.attention``.
        implementation: the kernels that it runs, one of `kernels.IMPLEMENTATIONS`; ``any``: torch chooses.
        cuda: it needs a CUDA device.
        dtypes: that it takes; empty: all.
        head_dims: (multiple, most) of d; most 0: no bound.
        capability: the least compute capability of the device.
        on_device: calls may have `DeviceSegments` (``runtime.capacity_quantum``).
        graph: a call can be part of a graph of torch.compile; False: it runs between two compiled graphs.
        whole_graph: so can a call with one segment. Where a subclass declares ``graph`` and not this or ``capture``,
            they are as that.
        capture: a call with one segment, or with `DeviceSegments` where those are supported, can be captured in a CUDA
            graph: nothing is made on the host for it. (Other lengths are the host's, so no capture holds them.)
        backward: it is differentiable.
        deterministic: the backward pass gives the same bits at every run: ``always``, ``asked`` (under
            ``torch.use_deterministic_algorithms``) or ``never``.
        plans: it prepares something on the host for every new shape, as cuDNN does its execution plans (about 6 ms
            each); ``auto`` then takes it only for shapes that repeat.
        takes_rope: it applies rotary positions itself and is called through `packed`.
        timed: ``auto`` may time it, and take it; False for what can take the process along where it fails.
    """

    name: ClassVar[str]
    implementation: str = "any"
    cuda: ClassVar[bool] = False
    dtypes: ClassVar[tuple[torch.dtype, ...]] = ()
    head_dims: ClassVar[tuple[int, int]] = (1, 0)
    capability: ClassVar[tuple[int, int]] = (0, 0)
    on_device: ClassVar[bool] = False
    graph: ClassVar[bool] = True
    whole_graph: ClassVar[bool] = True
    capture: ClassVar[bool] = True
    backward: ClassVar[bool] = True
    deterministic: ClassVar[str] = "asked"
    plans: ClassVar[bool] = False
    takes_rope: ClassVar[bool] = False
    timed: ClassVar[bool] = True

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        if "graph" in vars(cls):
            for name in {"whole_graph", "capture"} - vars(cls).keys():
                setattr(cls, name, cls.graph)

    def refusals(self, call: Call) -> list[str]:
        """All `objections`, and those that follow from what is declared of segments and of the backward pass."""
        reasons = self.objections(call)
        if call.on_device and not self.on_device:
            reasons.append("it needs the lengths of segments on the host (set runtime.capacity_quantum=0)")
        if call.grad and not self.backward:
            reasons.append("it has no backward pass")
        if call.grad and self.deterministic == "never" and torch.are_deterministic_algorithms_enabled():
            reasons.append("its backward pass is not deterministic, and torch.use_deterministic_algorithms is on")
        return reasons

    def objections(self, call: Call) -> list[str]:
        """Why this backend does not support the call, every reason; empty if it does.

        As declared: device, compute capability, dtype, channels of a head and their layout.
        """
        reasons = needs_cuda(call) if self.cuda else []
        if self.cuda and (found := capability(call.device)) is not None and found < self.capability:
            need, have = (".".join(map(str, pair)) for pair in (self.capability, found))
            reasons.append(f"it needs compute capability {need} or higher, the device has {have}")
        if self.dtypes and call.dtype not in self.dtypes:
            known = " and ".join(_short(dtype) for dtype in self.dtypes)
            reasons.append(f"it takes {known}, got {_short(call.dtype)}")
        multiple, most = self.head_dims
        if call.head_dim % multiple or (most and call.head_dim > most):
            wanted = ([f"a multiple of {multiple}"] if multiple > 1 else []) + ([f"at most {most}"] if most else [])
            reasons.append(f"it takes heads whose channels are {' and '.join(wanted)}, got {call.head_dim}")
        if self.cuda and call.stride != 1:
            reasons.append(f"it takes channels that lie side by side, got a stride of {call.stride}")
        return reasons

    def version(self) -> str:
        """Version of what runs, for `doctor` and the table of measurements; by default torch's."""
        return f"torch {torch.__version__}"

    @abstractmethod
    def __call__(self, q: Tensor, k: Tensor, v: Tensor, segments: Segments) -> Tensor:
        """softmax(q k^T / sqrt(d)) v within each segment: [B,K,H,d] each, any strides -> [B,K,H,d]. Differentiable."""

    def packed(self, qkv_BK3E: Tensor, rope: Tensor | None, num_heads: int, segments: Segments) -> Tensor:
        """The same from packed, unrotated ``qkv`` [B,K,3*E] -> [B,K,E], for a backend with ``takes_rope``.

        ``rope``: None, or float32 cosines and sines [K,2,R] or [B,K,2,R] as `ops.rope3d` takes them; ``qkv`` may be
        read in place and is not changed.
        """
        raise NotImplementedError(f"attention backend {self.name!r} declares takes_rope and has no packed()")

    def __reduce__(self) -> tuple[Callable[..., Backend], tuple[str, ...]]:
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


@functools.cache
def capability(device: torch.device) -> tuple[int, int] | None:
    """Compute capability of a CUDA device; None where there is no such device here to ask."""
    if device.type != "cuda" or not torch.cuda.is_available():
        return None
    found = torch.cuda.get_device_properties(device)
    return found.major, found.minor


def installed(package: str) -> bool:
    """Whether a module can be found, without importing it."""
    try:
        return importlib.util.find_spec(package) is not None
    except ModuleNotFoundError:  # its parent
        return False


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
