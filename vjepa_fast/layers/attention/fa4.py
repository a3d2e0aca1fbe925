"""FlashAttention 4 of the package flash-attn-4 (CuTe DSL): one call for all segments of all samples."""

from __future__ import annotations

import functools
from importlib import metadata

import torch
from torch import Tensor

from vjepa_fast.layers.attention.base import Backend, Call, Segments, register
from vjepa_fast.layers.attention.sdpa import HALF

_PACKAGE, _LEAST_CUDA = "flash-attn-4", (12, 9)


class Fa4(Backend):
    """``flash_attn.cute.flash_attn_varlen_func``; kernels are compiled at the first call of a kind."""

    name = "fa4"
    implementation = "fa4"
    cuda = True
    dtypes = HALF
    head_dims = (8, 128)
    capability = (9, 0)  # the forward pass alone runs on 8.0
    graph = False
    capture = True
    on_device = True

    def objections(self, call: Call) -> list[str]:
        """Why this backend does not support the call."""
        reasons = super().objections(call)
        if not self.version():
            return [*reasons, f"the package {_PACKAGE} is not installed (pip install --pre flash-attn-4[cu13])"]
        built = torch.version.cuda
        if built and tuple(map(int, built.split(".")[:2])) < _LEAST_CUDA:
            reasons.append(f"it needs CUDA {'.'.join(map(str, _LEAST_CUDA))} or newer, torch was built for {built}")
        return reasons or list(_import_error())

    def version(self) -> str:
        """Of the package; empty where it is not installed."""
        try:
            return f"{_PACKAGE} {metadata.version(_PACKAGE)}"
        except metadata.PackageNotFoundError:
            return ""

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, segments: Segments) -> Tensor:
        """One call for all segments of all samples."""
        from flash_attn.cute import flash_attn_varlen_func

        offsets, longest = segments.offsets(q.shape[0], q.device), segments.longest
        out = flash_attn_varlen_func(
            *(x.flatten(0, 1) for x in (q, k, v)),
            cu_seqlens_q=offsets,
            cu_seqlens_k=offsets,
            max_seqlen_q=longest,
            max_seqlen_k=longest,
            deterministic=torch.are_deterministic_algorithms_enabled(),
        )
        return (out[0] if isinstance(out, tuple) else out).view_as(q)


@functools.cache
def _import_error() -> tuple[str, ...]:
    """Its kernels are written in a language of their own, which may be missing or of another version."""
    try:
        from flash_attn.cute import flash_attn_varlen_func  # noqa: F401
    except Exception as error:  # whatever a package of kernels raises while it is imported
        return (f"{_PACKAGE} cannot be imported: {type(error).__name__}: {' '.join(str(error).split())[:200]}",)
    return ()


register(Fa4())
