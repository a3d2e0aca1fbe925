"""Self-attention of packed queries, keys and values in float32 on a CPU, with rotary positions (csrc/attention.cpp).

The calls of the C++ kernels for layers/cpu_block.py, which makes them from a node of autograd of its own where
`_cpp.LOADED`; they are no custom ops and know no other backend. Everywhere else attention is PyTorch's:
layers/attention/.

Legend: B batch, K tokens, H heads, d channels of a head, E = H*d, R <= d rotated channels.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor


# Made once and kept, so whatever mode or default device the first call is under: plain tensors on the CPU.
@functools.cache
@torch.inference_mode(False)
def _nowhere() -> Tensor:
    return torch.empty(0, device="cpu")  # tokens without positions


Lengths = tuple[int, ...] | Tensor  # of segments; int64 [S]


def _tensor_of(values: Lengths) -> Tensor:
    return values if isinstance(values, Tensor) else _lengths(values)


@functools.lru_cache(256)
@torch.inference_mode(False)
def _lengths(values: tuple[int, ...]) -> Tensor:
    return torch.tensor(values, dtype=torch.int64, device="cpu")


def attention(qkv: Tensor, table: Tensor | None, lengths: Lengths, num_heads: int) -> tuple[Tensor, Tensor]:
    """softmax(q k^T / sqrt(d)) v of each segment of tokens, q and k turned by their positions first (`ops.rope3d`).

    Args:
        qkv: [B,K,3*E], contiguous: q, k, v; in each, heads; channels.
        table: contiguous cosines and sines [K,2,R] or [B,K,2,R]; None: tokens without positions.
        lengths: tokens of each segment, which add up to K.
        num_heads: H.

    Returns:
        [B,K,E], and the base-2 logarithms of the softmax's sums [B,H,K], which the backward reads.

    Raises:
        RuntimeError: a shape, stride or length does not fit.

    Floor: qkv read once, the result written once; scores stay in the cache.
    """
    b, k, e3 = qkv.shape
    out, lse = qkv.new_empty(b, k, e3 // 3), qkv.new_empty(b, num_heads, k)
    table = _nowhere() if table is None else table
    torch.ops.vjepa_fast_cpp.attention(qkv, table, _tensor_of(lengths), num_heads, out, lse)
    return out, lse


def attention_backward(
    grad: Tensor, qkv: Tensor, table: Tensor | None, lengths: Lengths, num_heads: int, out: Tensor, lse: Tensor
) -> Tensor:
    """The gradient of qkv [B,K,3*E] from that of the result, [B,K,E], and from what ``attention`` returned."""
    dqkv = torch.empty_like(qkv)
    table = _nowhere() if table is None else table
    torch.ops.vjepa_fast_cpp.attention_backward(grad, qkv, table, _tensor_of(lengths), num_heads, out, lse, dqkv)
    return dqkv
