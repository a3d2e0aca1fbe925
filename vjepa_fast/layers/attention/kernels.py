"""Which implementation of attention a kernel belongs to, by its name in a profile: what ran, whatever was asked for."""

from __future__ import annotations

from collections.abc import Iterable

# In this order: cuDNN's names hold "flash", FlashAttention's hold "cutlass".
_SIGNS: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("cudnn", ("cudnn_generated", "cudnn::fusion", "_cudnn_attention")),
    (
        "fa4",
        ("flash_attncute", "flash_attn.cute", "flash_fwd_sm90", "flash_bwd_sm90", "flash_fwd_sm100", "flash_bwd_sm100"),
    ),
    ("fa3", ("FlashAttnFwdSm90", "FlashAttnBwdSm90", "FlashAttnFwdSm80", "FlashAttnBwdSm80", "_flash3")),
    ("flash", ("pytorch_flash::", "flash_fwd_kernel", "flash_fwd_splitkv", "flash_bwd_", "_flash_attention")),
    ("efficient", ("fmha_cutlass", "PyTorchMemEffAttention", "_efficient_attention")),
    ("triton", ("packed_attention",)),
    ("math", ("softmax_warp_", "cunn_SoftMax", "_attention_math")),
)
IMPLEMENTATIONS = tuple(name for name, _ in _SIGNS)


def implementation(name: str) -> str | None:
    """One of `IMPLEMENTATIONS` for the name of a CUDA kernel (or of an operator of PyTorch); None: not of attention.

    Kernels of the plain form (``math``) are products and a softmax; the softmax alone gives it away.
    """
    return next((found for found, signs in _SIGNS if any(sign in name for sign in signs)), None)


def implementations(names: Iterable[str]) -> set[str]:
    """All that occur in a profile's kernels. ``math`` counts where there is nothing else: a loss may have a softmax."""
    found = {kind for name in names if (kind := implementation(name))}
    return found - {"math"} or found
