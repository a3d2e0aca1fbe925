"""PyTorch's ``scaled_dot_product_attention``: as torch chooses, and with one implementation of it."""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from vjepa_fast.layers.attention.base import Backend, DeviceSegments, FrameCausal, Segments, register

HALF = (torch.bfloat16, torch.float16)


class Sdpa(Backend):
    """``scaled_dot_product_attention`` as torch chooses its kernels, on any device; on Hopper that is cuDNN."""

    name = "sdpa"
    on_device = True
    plans = True
    causal = True
    kernels: ClassVar[tuple[SDPBackend, ...]] = ()  # that torch may choose from; empty: all

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, segments: Segments) -> Tensor:
        """One call per segment; segments of one length go as one batch, and those of unknown ones as one padded batch.

        That computes each of the latter at its longest: a way that works everywhere, not a fast one.
        """
        if not self.kernels:
            return self._attend(q, k, v, segments)
        with sdpa_kernel(list(self.kernels)):
            return self._attend(q, k, v, segments)

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, segments: Segments) -> Tensor:
        if isinstance(segments, DeviceSegments):
            return self._padded(q, k, v, segments)
        if isinstance(segments, FrameCausal):
            return self._whole(q, k, v, segments.seen)
        lengths = segments.lengths
        # as of the predictor where nothing is truncated; a graph with symbolic lengths must not ask
        if len(lengths) > 1 and not torch.compiler.is_compiling() and len(set(lengths)) == 1:
            q_, k_, v_ = (x.reshape(-1, lengths[0], *x.shape[2:]) for x in (q, k, v))
            return self._whole(q_, k_, v_).reshape(q.shape)
        if len(lengths) == 1:
            return self._whole(q, k, v)
        parts = zip(*(x.split(list(lengths), 1) for x in (q, k, v)))
        return torch.cat([self._whole(*part) for part in parts], 1)

    def _whole(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        return F.scaled_dot_product_attention(q, k, v, mask).transpose(1, 2)

    def _padded(self, q: Tensor, k: Tensor, v: Tensor, segments: DeviceSegments) -> Tensor:
        rows = segments.rows  # past its end a segment repeats its own last row
        out = self._whole(q[0, rows], k[0, rows], v[0, rows], segments.seen[:, None, None])
        return out.flatten(0, 1).index_select(0, segments.slots(q.shape[1]))[None]


class SdpaFlash(Sdpa):
    """``scaled_dot_product_attention`` with PyTorch's flash kernels (FlashAttention 2) and no others."""

    name = "sdpa_flash"
    implementation = "flash"
    kernels = (SDPBackend.FLASH_ATTENTION,)
    cuda = True
    dtypes = HALF
    head_dims = (1, 256)
    capability = (8, 0)
    on_device = causal = False  # it takes no mask
    plans = False


class SdpaCudnn(Sdpa):
    """``scaled_dot_product_attention`` with cuDNN's kernels and no others; each new shape costs an execution plan."""

    name = "sdpa_cudnn"
    implementation = "cudnn"
    kernels = (SDPBackend.CUDNN_ATTENTION,)
    cuda = True
    dtypes = HALF
    head_dims = (8, 128)
    capability = (8, 0)
    on_device = False  # every segment would be computed at its longest
    causal = False  # `sdpa` chooses it for masks where it is quick
    deterministic = "never"

    def version(self) -> str:
        """Of torch and cuDNN."""
        return f"{super().version()}, cuDNN {torch.backends.cudnn.version()}"

    def _whole(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
        if k.shape[1] == 1:  # cuDNN takes none; a token that sees itself only is its own v
            return v
        return super()._whole(q, k, v, mask)


class SdpaSteady(Sdpa):
    """What is left for ``auto`` on CUDA where no other backend supports a call: torch's choice among all but cuDNN."""

    name = "sdpa_not_cudnn"
    kernels = (SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH)
    cuda = True
    plans = False

    def __reduce__(self) -> tuple[Callable[..., Backend], tuple[str, ...]]:
        return _steady, ()


def _steady() -> SdpaSteady:
    return STEADY


SDPA, SDPA_FLASH = register(Sdpa()), register(SdpaFlash())
SDPA_CUDNN = register(SdpaCudnn())
STEADY = SdpaSteady()  # no name to choose it by
