"""A transformer block on a CPU as one node of autograd, written out by hand: fewer activations kept, fewer passes.

Legend: B batch, K tokens, E width, H heads, F hidden width of the feed-forward.

What autograd would keep of a block is 15 E numbers per token. Here it is 10 E: the input, q, k and v, the output of the
attention, the sum after it, and the hidden layer before its GELU. The outputs of both LayerNorms and of the GELU are
made again in the backward pass, by passes over memory, not by matrix products. Positions are applied as the attention
reads its queries and keys, residuals are added by the matrix product that precedes them, some rows at a time go through
both layers of the feed-forward, and the gradients of q, k and v of all segments are written into one packed tensor.
Kernels: csrc/attention.cpp, linear.cpp, norm.cpp, through the ops of these names.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from vjepa_fast import ops
from vjepa_fast.layers.attention import DeviceSegments, FrameCausal, Lengths
from vjepa_fast.layers.linear import Linear
from vjepa_fast.ops import _cpp
from vjepa_fast.ops.attention import attention, attention_backward
from vjepa_fast.ops.linear import block_linear, block_linear_backward, feed_forward, feed_forward_backward, outer
from vjepa_fast.ops.norm import layer_norm_again, layer_norm_backward

if TYPE_CHECKING:
    from vjepa_fast.layers.block import Block


HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def untouched(block: Block) -> bool:
    """Whether all layers of a block with the plain feed-forward have a bias, and none was replaced (as adapters do) or
    hooked.
    """
    attn, mlp = block.attn, block.mlp
    layers = {Linear: (attn.qkv, attn.proj, mlp.fc1, mlp.fc2), nn.LayerNorm: (block.norm1, block.norm2)}
    if any(type(x) is not kind or x.weight is None or x.bias is None for kind, own in layers.items() for x in own):
        return False
    parts = (attn, mlp, *layers[Linear], *layers[nn.LayerNorm])
    return not any(getattr(x, name) for x in parts for name in HOOKS)


def fits(block: Block) -> bool:
    """Whether ``apply`` computes what this block does: it is `untouched`, and no attention backend is forced."""
    return block.attn.backend is None and untouched(block)


def supports(x: Tensor, rope: Tensor | None, lengths: Lengths = None) -> bool:
    """Whether ``apply`` can take the place of the plain block for these tokens: float32 on a CPU, and our C++.

    Autograd through it works once, not twice.
    """
    if x.device.type != "cpu" or x.dtype != torch.float32 or not x.numel() or isinstance(lengths, FrameCausal):
        return False
    if torch.compiler.is_compiling() or torch.is_autocast_enabled("cpu") or ops.current_backend() == "eager":
        return False
    return (rope is None or not rope.is_complex()) and _cpp.LOADED


def apply(block: Block, x: Tensor, rope: Tensor | None, lengths: Lengths) -> Tensor:
    """``Block`` with a plain feed-forward: x [B,K,E] float32 -> [B,K,E]. ``rope``: rows of the table, or None."""
    attn, mlp = block.attn, block.mlp
    rope = None if rope is None else rope.contiguous()
    if isinstance(lengths, DeviceSegments):  # on a CPU that is where the kernel reads them
        sizes = lengths.sizes
    else:
        sizes = (x.shape[1],) if lengths is None else tuple(lengths)
    layers = (block.norm1, attn.qkv, attn.proj, block.norm2, mlp.fc1, mlp.fc2)
    weights = tuple(w.contiguous() for m in layers for w in (m.weight, m.bias))  # the kernels read plain arrays
    eps = block.norm1.eps, block.norm2.eps
    if torch.is_grad_enabled():
        return _Block.apply(x, rope, sizes, attn.num_heads, eps, *weights)
    return _attended(x.contiguous(), rope, sizes, attn.num_heads, eps, weights)


def _attended(x, rope, lengths, heads, eps, weights) -> Tensor:
    n1w, n1b, wqkv, bqkv, wp, bp, n2w, n2b, w1, b1, w2, b2 = weights
    u = torch.native_layer_norm(x, x.shape[-1:], n1w, n1b, eps[0])[0]
    y = block_linear(attention(block_linear(u, wqkv, bqkv), rope, lengths, heads)[0], wp, bp, x)
    v = torch.native_layer_norm(y, x.shape[-1:], n2w, n2b, eps[1])[0]
    return feed_forward(v, w1, b1, w2, b2, y, keep=False)[0]


class _Block(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, rope, lengths, heads, eps, n1w, n1b, wqkv, bqkv, wp, bp, n2w, n2b, w1, b1, w2, b2):
        x = x.contiguous()
        u, *stats_1 = torch.native_layer_norm(x, x.shape[-1:], n1w, n1b, eps[0])
        qkv = block_linear(u, wqkv, bqkv)
        attended, lse = attention(qkv, rope, lengths, heads)
        y = block_linear(attended, wp, bp, x)
        v, *stats_2 = torch.native_layer_norm(y, x.shape[-1:], n2w, n2b, eps[1])
        out, hidden = feed_forward(v, w1, b1, w2, b2, y, keep=True)
        ctx.lengths, ctx.heads = lengths, heads
        ctx.save_for_backward(
            x, *stats_1, qkv, attended, lse, y, *stats_2, rope, n1w, n1b, wqkv, wp, n2w, n2b, w1, w2, hidden
        )
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, *grads: Tensor):  # pyright: ignore[reportIncompatibleMethodOverride]  # the decorator's types
        x, mean_1, rstd_1, qkv, attended, lse, y, mean_2, rstd_2, rope, *weights, hidden = ctx.saved_tensors
        n1w, n1b, wqkv, wp, n2w, n2b, w1, w2 = weights
        grad = grads[0].contiguous()

        # feed-forward: out = y + gelu(norm2(y) W1^T + b1) W2^T + b2, some rows at a time, which stay in the cache
        v = layer_norm_again(y, mean_2, rstd_2, n2w, n2b)
        dv, dw1, db1, dw2, db2 = feed_forward_backward(grad, v, hidden, w1, w2)
        dy = grad.clone()
        dn2w, dn2b = layer_norm_backward(dv, y, mean_2, rstd_2, n2w, dy)

        # attention: y = x + attention(norm1(x) Wqkv^T + bqkv) Wp^T + bp
        dwp, dbp = outer(dy, attended)
        dqkv = attention_backward(block_linear_backward(dy, wp), qkv, rope, ctx.lengths, ctx.heads, attended, lse)
        dwqkv, dbqkv = outer(dqkv, layer_norm_again(x, mean_1, rstd_1, n1w, n1b))
        dx = dy
        dn1w, dn1b = layer_norm_backward(block_linear_backward(dqkv, wqkv), x, mean_1, rstd_1, n1w, dx)
        return dx, None, None, None, None, dn1w, dn1b, dwqkv, dbqkv, dwp, dbp, dn2w, dn2b, dw1, db1, dw2, db2
