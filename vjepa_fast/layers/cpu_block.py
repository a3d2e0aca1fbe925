"""A transformer block on a CPU as one node of autograd, written out by hand: fewer activations kept, fewer passes.

Legend: B batch, K tokens, E width, H heads, F hidden width of the feed-forward.

What autograd would keep of a block is 15 E numbers per token. Here it is 10 E: the input, q, k and v, the output of the
attention, the sum after it, and the hidden layer before its GELU. The outputs of both LayerNorms and of the GELU are
made again in the backward pass, by passes over memory, not by matrix products. Positions are applied as the attention
reads its queries and keys, residuals are added by the matrix product that precedes them, some rows at a time go through
both layers of the feed-forward, and the gradients of q, k and v of all segments are written into one packed tensor.
Kernels: csrc/attention.cpp, linear.cpp, outer.cpp, layer_norm.cpp.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from vjepa_fast import ops
from vjepa_fast.layers.attention import Lengths
from vjepa_fast.layers.linear import Linear
from vjepa_fast.ops import _cpp
from vjepa_fast.ops.linear import add_outer

if TYPE_CHECKING:
    from vjepa_fast.layers.block import Block

_PORTION = 512  # rows of the feed-forward's backward at a time: the gradient of the hidden layer is never there for all


def fits(block: Block) -> bool:
    """Whether ``apply`` computes what this block does, its feed-forward being the plain one: all layers have a bias,
    none was replaced (as adapters do) or hooked, and no attention backend is forced.
    """
    attn, mlp = block.attn, block.mlp
    if attn.backend is not None:
        return False
    layers = {Linear: (attn.qkv, attn.proj, mlp.fc1, mlp.fc2), nn.LayerNorm: (block.norm1, block.norm2)}
    if any(type(x) is not kind or x.weight is None or x.bias is None for kind, own in layers.items() for x in own):
        return False
    parts = (attn, mlp, *layers[Linear], *layers[nn.LayerNorm])
    hooks = "_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks"
    return not any(getattr(x, name) for x in parts for name in hooks)


def supports(x: Tensor, rope: Tensor | None) -> bool:
    """Whether ``apply`` can take the place of the plain block for these tokens: float32 on a CPU, and our C++.

    Autograd through it works once, not twice.
    """
    if x.device.type != "cpu" or x.dtype != torch.float32 or not x.numel():
        return False
    if torch.compiler.is_compiling() or torch.is_autocast_enabled("cpu") or ops.current_backend() == "eager":
        return False
    return (rope is None or not rope.is_complex()) and _cpp.LOADED


def apply(block: Block, x: Tensor, rope: Tensor | None, lengths: Lengths) -> Tensor:
    """``Block`` with a plain feed-forward: x [B,K,E] float32 -> [B,K,E]. ``rope``: rows of the table, or None."""
    attn, mlp = block.attn, block.mlp
    rope = _nowhere() if rope is None else rope.contiguous()
    sizes = _lengths((x.shape[1],) if lengths is None else tuple(lengths))
    layers = (block.norm1, attn.qkv, attn.proj, block.norm2, mlp.fc1, mlp.fc2)
    weights = tuple(w.contiguous() for m in layers for w in (m.weight, m.bias))  # the kernels read plain arrays
    eps = block.norm1.eps, block.norm2.eps
    if torch.is_grad_enabled():
        return _Block.apply(x, rope, sizes, attn.num_heads, eps, *weights)
    return _attended(x.contiguous(), rope, sizes, attn.num_heads, eps, weights)


# Made once and kept, so whatever mode or default device the first call is under: plain tensors on the CPU.
@functools.cache
@torch.inference_mode(False)
def _nowhere() -> Tensor:
    return torch.empty(0, device="cpu")  # tokens without positions


@functools.lru_cache(256)
@torch.inference_mode(False)
def _lengths(values: tuple[int, ...]) -> Tensor:
    return torch.tensor(values, dtype=torch.int64, device="cpu")


def _attention(u: Tensor, wqkv: Tensor, bqkv: Tensor, rope: Tensor, lengths: Tensor, heads: int):
    """Packed qkv [B,K,3*E] of u, the attention's output [B,K,E], and the row sums [B,H,K] that its backward reads."""
    qkv, out = _linear(u, wqkv, bqkv), torch.empty_like(u)
    lse = u.new_empty(u.shape[0], heads, u.shape[1])
    torch.ops.vjepa_fast_cpp.attention(qkv, rope, lengths, heads, out, lse)
    return qkv, out, lse


def _linear(x: Tensor, w: Tensor, b: Tensor, other: Tensor | None = None) -> Tensor:
    """X W^T + b (+ other): x [B,K,I], w [O,I] -> [B,K,O]."""
    out = x.new_empty(*x.shape[:-1], len(w))
    other = _nothing_kept() if other is None else _rows(other)
    torch.ops.vjepa_fast_cpp.linear(_rows(x), w, b, other, _rows(out))
    return out


def _linear_backward(grad: Tensor, w: Tensor) -> Tensor:
    """The gradient in x of x W^T: grad [B,K,O] -> [B,K,I]."""
    out = grad.new_empty(*grad.shape[:-1], w.shape[1])
    torch.ops.vjepa_fast_cpp.linear_backward(_rows(grad), w, _rows(out))
    return out


def _feed_forward(v: Tensor, w1, b1, w2, b2, y: Tensor, hidden: Tensor) -> Tensor:
    """Y + gelu(v W1^T + b1) W2^T + b2; ``hidden`` [B*K,F] gets what comes before the GELU (or is empty)."""
    out = torch.empty_like(y)
    torch.ops.vjepa_fast_cpp.feed_forward(_rows(v), w1, b1, w2, b2, _rows(y), hidden, _rows(out))
    return out


def _attended(x, rope, lengths, heads, eps, weights) -> Tensor:
    n1w, n1b, wqkv, bqkv, wp, bp, n2w, n2b, w1, b1, w2, b2 = weights
    u = torch.native_layer_norm(x, x.shape[-1:], n1w, n1b, eps[0])[0]
    y = _linear(_attention(u, wqkv, bqkv, rope, lengths, heads)[1], wp, bp, x)
    v = torch.native_layer_norm(y, x.shape[-1:], n2w, n2b, eps[1])[0]
    return _feed_forward(v, w1, b1, w2, b2, y, _nothing_kept())


class _Block(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, rope, lengths, heads, eps, n1w, n1b, wqkv, bqkv, wp, bp, n2w, n2b, w1, b1, w2, b2):
        x = x.contiguous()
        u, *stats_1 = torch.native_layer_norm(x, x.shape[-1:], n1w, n1b, eps[0])
        qkv, attended, lse = _attention(u, wqkv, bqkv, rope, lengths, heads)
        y = _linear(attended, wp, bp, x)
        v, *stats_2 = torch.native_layer_norm(y, x.shape[-1:], n2w, n2b, eps[1])
        hidden = x.new_empty(x.numel() // x.shape[-1], len(w1))
        out = _feed_forward(v, w1, b1, w2, b2, y, hidden)
        ctx.heads = heads
        ctx.save_for_backward(
            x, *stats_1, qkv, attended, lse, y, *stats_2, rope, lengths, n1w, n1b, wqkv, wp, n2w, n2b, w1, w2, hidden
        )
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, *grads: Tensor):  # pyright: ignore[reportIncompatibleMethodOverride]  # the decorator's types
        cpp = torch.ops.vjepa_fast_cpp
        x, mean_1, rstd_1, qkv, attended, lse, y, mean_2, rstd_2, rope, lengths, *weights, hidden = ctx.saved_tensors
        n1w, n1b, wqkv, wp, n2w, n2b, w1, w2 = weights
        grad = grads[0].contiguous()

        # feed-forward: out = y + gelu(norm2(y) W1^T + b1) W2^T + b2, some rows at a time, which stay in the cache
        normed, dv = torch.empty_like(x), torch.empty_like(x)
        cpp.norm_again(y, mean_2, rstd_2, n2w, n2b, normed)
        (dw1, db1), (dw2, db2) = _zeros(w1), _zeros(w2)
        cpp.feed_forward_backward(_rows(grad), _rows(normed), hidden, w1, w2, _PORTION, _rows(dv), dw1, db1, dw2, db2)
        dn2w, dn2b, dy = torch.empty_like(n2w), torch.empty_like(n2w), grad.clone()
        cpp.norm_backward(dv, y, mean_2, rstd_2, n2w, dy, dn2w, dn2b)  # adds to dy

        # attention: y = x + attention(norm1(x) Wqkv^T + bqkv) Wp^T + bp
        dwp, dbp = _zeros(wp)
        add_outer(dy, attended, dwp, dbp)
        dqkv = torch.empty_like(qkv)
        cpp.attention_backward(_linear_backward(dy, wp), qkv, rope, lengths, ctx.heads, attended, lse, dqkv)
        cpp.norm_again(x, mean_1, rstd_1, n1w, n1b, normed)
        dwqkv, dbqkv = _zeros(wqkv)
        add_outer(dqkv, normed, dwqkv, dbqkv)
        dn1w, dn1b, dx = torch.empty_like(n1w), torch.empty_like(n1w), dy
        cpp.norm_backward(_linear_backward(dqkv, wqkv), x, mean_1, rstd_1, n1w, dx, dn1w, dn1b)
        return dx, None, None, None, None, dn1w, dn1b, dwqkv, dbqkv, dwp, dbp, dn2w, dn2b, dw1, db1, dw2, db2


def _rows(x: Tensor) -> Tensor:
    return x.view(-1, x.shape[-1])


def _zeros(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Zeros to add the gradients of a weight [O,I] and its bias [O] to."""
    return torch.zeros_like(weight), weight.new_zeros(len(weight))


@functools.cache
@torch.inference_mode(False)
def _nothing_kept() -> Tensor:
    return torch.empty(0, 0, device="cpu")
