"""Transformer blocks in 16-bit floats on a GPU, their passes over memory merged into kernels that run anyway.

Legend: B batch, K tokens, n = B*K rows, E width, H heads, F hidden width of the feed-forward, L levels.

Two nodes of autograd per block, around the attention: residual + LayerNorm + qkv, and projection + residual + LayerNorm
+ feed-forward. A block does not add its last branch to the residual stream: it hands both on, and the LayerNorm of the
next block, or of a level, adds them in the pass that it takes anyway (`ops.add_norm`), bias included; its backward
sums the gradients of weight and bias, and of that last bias, in the pass that gives the gradient of the stream. GELU
and its slope are the last step of the products before them (`ops.gelu`). All levels are written side by side.

Kept for the backward: the stream before the attention and after it, q, k and v, the output of the attention, and the
hidden layer before its GELU: 10 E numbers of 16 bits per token, and 4 + H of 32 bits. The outputs of both LayerNorms
and of the GELU are made again by the kernels of the backward, beside what they compute.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextvars import ContextVar
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from vjepa_fast import ops
from vjepa_fast.layers.attention import Lengths
from vjepa_fast.layers.cpu_block import HOOKS, untouched
from vjepa_fast.ops import _triton
from vjepa_fast.ops.add_norm import add_norm, add_norm_backward
from vjepa_fast.ops.gelu import gelu_linear, gelu_linear_backward, quack_objections

if TYPE_CHECKING:
    from vjepa_fast.layers.block import Block

HALF = (torch.bfloat16, torch.float16)
# the dtype of autocast in a rehearsal (trainer/warm.py), on a device that has none
REHEARSED: ContextVar[torch.dtype | None] = ContextVar("dtype of a rehearsal", default=None)
Pending = tuple[Tensor, Tensor] | tuple[None, None]  # [B,K,E] that the stream still lacks, and the bias [E] it lacks


def fits(block: Block) -> bool:
    """Whether ``apply`` computes what this block does, its feed-forward being the plain one, and is not switched off:
    no layer was replaced, hooked, lacks a bias or multiplies in 8 bits.
    """
    if block.epilogues is False or not untouched(block) or _hooked(block):
        return False
    return not any(x.fp8 for x in (block.attn.qkv, block.attn.proj, block.mlp.fc1, block.mlp.fc2))


def objections(how: str, device: torch.device, dtype: torch.dtype) -> list[str]:
    """Why blocks cannot be fused on this device and in this dtype, with products by ``how``; empty if they can."""
    reasons = [] if device.type == "cuda" else [f"it needs CUDA, the run is on {device.type}"]
    if dtype not in HALF:
        reasons.append(f"it needs runtime.dtype=bfloat16, got {str(dtype).removeprefix('torch.')}")
    return reasons + (quack_objections() if how == "quack" else [])


def dtype_of(x: Tensor) -> torch.dtype:
    """In what blocks compute on ``x``: that of autocast where it is on, else x's."""
    kind, rehearsed = x.device.type, REHEARSED.get()
    if rehearsed is not None:
        return rehearsed
    on = torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)
    return torch.get_autocast_dtype(kind) if on else x.dtype


def supports(x: Tensor, norms: Mapping[int, nn.Module]) -> bool:
    """Whether ``apply`` can take the place of plain blocks for these tokens: 16-bit floats on CUDA, and our kernels.

    Autograd through it works once, not twice.
    """
    if ops.current_backend() in ("eager", "cpp") or dtype_of(x) not in HALF or not x.numel():
        return False
    if any(type(norm) is not nn.LayerNorm or norm.bias is None or _hooked(norm) for norm in norms.values()):
        return False
    return not _triton.objections(x)


def _hooked(module: nn.Module) -> bool:
    return any(getattr(module, name) for name in HOOKS)


def apply(
    blocks: Sequence[Block],
    norms: Mapping[int, nn.LayerNorm],
    x: Tensor,
    rope: Tensor | None,
    recompute: bool,
    lengths: Lengths,
) -> Tensor:
    """The blocks one after the other, and what comes out of those numbered in ``norms`` through its norm.

    Args:
        blocks: with a plain feed-forward.
        norms: number of a block, from 0 -> its LayerNorm, in this order; the last block has one.
        x: [B,K,E].
        rope: of the tokens, as in `attention.attend`.
        recompute: keep the input of a block only, and do the rest again in the backward pass.
        lengths: of segments, as in `attention.attend`.

    Returns:
        [B,K,len(norms)*E] in the dtype of the computation, the norms' outputs side by side.
    """
    recompute = recompute and torch.is_grad_enabled()
    x, pending, streams = x.to(dtype_of(x)).contiguous(), (None, None), []
    for number, block in enumerate(blocks):
        if recompute:
            if number - 1 in norms:
                streams.append(x)
            x = checkpoint(_whole, block, x, rope, lengths, use_reentrant=False, preserve_rng_state=False)
        else:
            before, x, pending = _block(block, x, pending, rope, lengths)
            if number - 1 in norms:
                streams.append(before)
    layers = [p for norm in norms.values() for p in (norm.weight, norm.bias)]
    return _Levels.apply([norm.eps for norm in norms.values()], *pending, *streams, x, *layers)


def _whole(block: Block, x: Tensor, rope: Tensor | None, lengths: Lengths) -> Tensor:
    """[B,K,E] -> [B,K,E]: the block with all that it adds."""
    _, x, (y, shift) = _block(block, x, (None, None), rope, lengths)
    assert y is not None and shift is not None
    return x + (y + shift.to(y.dtype))


def _block(
    block: Block, x: Tensor, pending: Pending, rope: Tensor | None, lengths: Lengths
) -> tuple[Tensor, Tensor, Pending]:
    """The stream [B,K,E] before the attention and after it, and what it still lacks."""
    attn, mlp, keep = block.attn, block.mlp, torch.is_grad_enabled()
    norm, qkv = block.norm1, attn.qkv
    x, packed = _NormLinear.apply(norm.eps, x, *pending, norm.weight, norm.bias, qkv.weight, qkv.bias)
    attended = attn.attend(packed, rope, lengths)
    norm, proj, fc1, fc2 = block.norm2, attn.proj, mlp.fc1, mlp.fc2
    layers = proj.weight, proj.bias, norm.weight, norm.bias, fc1.weight, fc1.bias, fc2.weight
    after, y = _FeedForward.apply((norm.eps, keep, str(block.epilogues)), x, attended, *layers)
    return x, after, (y, fc2.bias)


def _rows(x: Tensor) -> Tensor:
    return x.reshape(-1, x.shape[-1]).contiguous()


def _added(
    eps: float, x: Tensor, y: Tensor | None, shift: Tensor | None, weight: Tensor, bias: Tensor, out: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """`ops.add_norm`, with the sum also where nothing is added."""
    total, mean, rstd = add_norm(x, y, shift, weight, bias, eps, out)
    return x if y is None else total, mean, rstd


def _outer(grad: Tensor, x: Tensor, dtype: torch.dtype) -> Tensor:
    """``grad^T x`` [O,I], the gradient of a weight of this dtype: grad [n,O], x [n,I] of 16 bits."""
    if grad.is_cuda and dtype == torch.float32:
        return torch.mm(grad.t(), x, out_dtype=dtype)  # as it is summed, without a copy in 16 bits
    return (grad.t() @ x).to(dtype)


def _gradients(
    sums: Tensor, shift: Tensor | None, weight: Tensor, bias: Tensor
) -> tuple[Tensor | None, Tensor, Tensor]:
    """The gradients of these three in their dtypes, from the ``sums`` of `add_norm_backward`."""
    last = None if shift is None else sums[2].to(shift.dtype)
    return last, sums[0].to(weight.dtype), sums[1].to(bias.dtype)


class _NormLinear(torch.autograd.Function):
    """The stream with what it lacked, and qkv of its LayerNorm."""

    @staticmethod
    def forward(ctx, eps, x, y, shift, weight, bias, w, b):
        low, normed = w.to(x.dtype), x.new_empty(x.shape[:-1].numel(), x.shape[-1])
        total, mean, rstd = _added(eps, _rows(x), None if y is None else _rows(y), shift, weight, bias, normed)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(total, mean, rstd, shift, weight, bias, low)
        ctx.dtypes = w.dtype, b.dtype
        qkv = F.linear(normed, low, b.to(x.dtype))
        return total.view(x.shape), qkv.view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx, *grads):
        total, mean, rstd, shift, weight, bias, low = ctx.saved_tensors
        rest, grad = None if grads[0] is None else _rows(grads[0]), _rows(grads[1])
        again = bias if ctx.needs_input_grad[6] else None
        dx, normed, sums = add_norm_backward(grad @ low, total, rest, weight, again, mean, rstd)
        dw = None if again is None else _outer(grad, normed, ctx.dtypes[0])
        db = grad.sum(0, dtype=torch.float32).to(ctx.dtypes[1])
        dx = dx.view(*grads[1].shape[:-1], -1)
        return None, dx, None if shift is None else dx, *_gradients(sums, shift, weight, bias), dw, db


class _FeedForward(torch.autograd.Function):
    """The stream with the projection of what was attended to, and the feed-forward of its norm, its last bias apart."""

    @staticmethod
    def forward(ctx, options, x, attended, wp, bp, weight, bias, w1, b1, w2):
        (eps, keep, how), dtypes = options, [w.dtype for w in (wp, w1, b1, w2)]
        wp, w1, w2 = (w.to(x.dtype) for w in (wp, w1, w2))
        attended, normed = _rows(attended), x.new_empty(x.shape[:-1].numel(), x.shape[-1])
        total, mean, rstd = _added(eps, _rows(x), attended @ wp.t(), bp, weight, bias, normed)
        hidden, active = gelu_linear(normed, w1, b1, keep, how)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(attended, total, mean, rstd, hidden, wp, bp, weight, bias, w1, w2)
        ctx.how, ctx.dtypes = how, dtypes
        return total.view(x.shape), (active @ w2.t()).view(x.shape)

    @staticmethod
    def backward(ctx, *grads):
        attended, total, mean, rstd, hidden, wp, bp, weight, bias, w1, w2 = ctx.saved_tensors
        rest, grad = None if grads[0] is None else _rows(grads[0]), _rows(grads[1])
        dtype_p, dtype_1, dtype_b, dtype_2 = ctx.dtypes
        slope, active, db1 = gelu_linear_backward(grad, w2, hidden, ctx.how)
        dw2 = _outer(grad, active, dtype_2)
        del active
        dx, normed, sums = add_norm_backward(slope @ w1, total, rest, weight, bias, mean, rstd)
        dw1 = _outer(slope, normed, dtype_1)
        del slope, normed
        shape = *grads[1].shape[:-1], -1
        layers = _outer(dx, attended, dtype_p), *_gradients(sums, bp, weight, bias), dw1, db1.to(dtype_b), dw2
        return None, dx.view(shape), (dx @ wp).view(shape), *layers


class _Levels(torch.autograd.Function):
    """The LayerNorms of several streams, the last of which may lack something, side by side."""

    @staticmethod
    def forward(ctx, eps, y, shift, *rest):
        levels = len(eps)
        streams, layers = rest[:levels], rest[levels:]
        shape, kept = streams[0].shape, []
        out = streams[0].new_empty(shape[:-1].numel(), levels, shape[-1])
        for level, (x, weight, bias) in enumerate(zip(streams, layers[::2], layers[1::2])):
            lacks = (None if y is None else _rows(y), shift) if level == levels - 1 else (None, None)
            kept += _added(eps[level], _rows(x), *lacks, weight, bias, out[:, level])
        ctx.save_for_backward(*kept, *layers, shift)
        return out.view(*shape[:-1], -1)

    @staticmethod
    def backward(ctx, *grads):
        *kept, shift = ctx.saved_tensors
        levels, last = len(kept) // 5, None
        grad, shape = grads[0].reshape(-1, levels, kept[0].shape[1]), grads[0].shape[:-1]
        streams, layers = [], []
        for level in range(levels):
            total, mean, rstd = kept[3 * level : 3 * level + 3]
            weight, bias = kept[3 * levels + 2 * level : 3 * levels + 2 * level + 2]
            dx, _, sums = add_norm_backward(grad[:, level], total, None, weight, None, mean, rstd)
            streams.append(dx.view(*shape, -1))
            last, *of_norm = _gradients(sums, shift, weight, bias)
            layers += of_norm
        return None, None if shift is None else streams[-1], last, *streams, *layers
