"""Attention of packed queries, keys and values within the segments of a stream, with rotary positions.

Legend: B batch, K tokens, H heads, d channels of a head, E = H*d, R <= d rotated channels, S segments.
"""

from __future__ import annotations

import itertools
import math
from typing import Any

import torch
from torch import Tensor

from vjepa_fast.ops import _backend, _check, _triton
from vjepa_fast.ops.rope import check_rope

MOST_CHANNELS = {2: 128, 4: 64}  # bytes of a number -> channels of a head that the Triton kernels support


def packed_attention(qkv: Tensor, table: Tensor | None, offsets: Tensor, num_heads: int) -> Tensor:
    """softmax(q k^T / sqrt(d)) v of each segment's tokens among themselves, q and k turned first as by ``rope3d``.

    The B*K tokens follow one another in one stream; lengths of segments may differ at every step, as they are read on
    the device only. Tokens behind the last segment are filler: their result and gradient are zeros, whatever they hold.

    Args:
        qkv: [B,K,3*E], any floating dtype: q, k, v; in each, heads; channels.
        table: float32 [K,2,R] or [B,K,2,R], cosines and sines (`vjepa_fast.ops.rope`); None: tokens without positions.
            No gradient reaches it.
        offsets: int32 [S+1], ascending from 0, where qkv is: segment s is tokens offsets[s] up to offsets[s+1]. It may
            be empty.
        num_heads: H, a divisor of E.

    Returns:
        A new tensor [B,K,E] of qkv's dtype. Differentiable once; sums keep their order, so runs are equal bit by bit.

    Raises:
        ValueError: a shape or dtype does not fit, or (on a CPU) offsets are not ascending within the stream.

    Floor: qkv and table read once, the result written once; backward qkv, the result and its gradient read once, qkv's
    gradient written once; and 4*E operations forward, 10*E backward, for each pair of tokens of a segment.
    """
    op = "packed_attention"
    check_rope(op, qkv, table, num_heads)
    ok = offsets.dim() == 1 and offsets.dtype == torch.int32 and offsets.device == qkv.device and offsets.shape[0] > 0
    _check.require(ok, op, "offsets", f"int32 [S+1] on {qkv.device}", offsets)
    return _packed_attention(qkv, table, offsets, num_heads)[0]


def _check_order(offsets: Tensor, rows: int) -> None:
    """Looked at on the CPU; elsewhere it would wait, so only while debugging."""
    if offsets.device.type == "cpu" or _check.debugging():
        n = offsets.tolist()
        ok = n[0] == 0 and n[-1] <= rows and all(a <= b for a, b in itertools.pairwise(n))
        _check.require(ok, "packed_attention", "offsets", f"ascending from 0 to at most B*K={rows}", n)


def _heads(x: Tensor, num_heads: int) -> Tensor:
    """[B,K,E] -> [H,B*K,d] in the dtype that is computed in."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    return wide.flatten(0, 1).unflatten(-1, (num_heads, -1)).transpose(0, 1)


def _turn(qkv: Tensor, table: Tensor | None, num_heads: int, transpose: bool = False) -> Tensor:
    if table is None:
        return qkv
    out = torch.empty_like(qkv)
    _backend.implementation("rope3d", "eager")(qkv, table, num_heads, transpose, out)
    return out


class _Eager:
    """Segment by segment, as matrix products. Operands of a product are rounded to qkv's dtype, as tensor cores take
    them, and all else is computed in promote_types(dtype, float32).
    """

    def __init__(self, qkv: Tensor, table: Tensor | None, offsets: Tensor, num_heads: int):
        self.dtype = qkv.dtype
        self.q, self.k, self.v = (_heads(x, num_heads) for x in _turn(qkv, table, num_heads).chunk(3, -1))
        self.segments = [slice(*ends) for ends in itertools.pairwise(offsets.tolist())]
        self.scale = self.q.shape[-1] ** -0.5

    def scores(self, s: slice) -> Tensor:
        """[H,n,n], to base 2."""
        return self.q[:, s] @ self.k[:, s].mT * (self.scale / math.log(2))

    def rounded(self, x: Tensor) -> Tensor:
        return x.to(self.dtype).to(x.dtype)


def _packed(x: Tensor, like: Tensor) -> Tensor:
    """[H,B*K,d] -> [B,K,E]."""
    return x.transpose(0, 1).flatten(1).unflatten(0, like.shape[:2]).to(like.dtype)


@_backend.register("packed_attention", "eager")
def _eager(qkv: Tensor, table: Tensor | None, offsets: Tensor, num_heads: int) -> tuple[Tensor, Tensor]:
    a = _Eager(qkv, table, offsets, num_heads)
    out, lse = torch.zeros_like(a.v), a.v.new_zeros(a.v.shape[:2])
    for s in a.segments:
        scores = a.scores(s)
        lse[:, s] = torch.logsumexp(scores * math.log(2), -1) / math.log(2)
        p = torch.exp2(scores - lse[:, s, None])
        out[:, s] = a.rounded(p) @ a.v[:, s]
    return _packed(out, qkv), lse.unflatten(1, qkv.shape[:2])


@_backend.register("packed_attention_backward", "eager")
def _eager_backward(
    grad: Tensor, qkv: Tensor, table: Tensor | None, offsets: Tensor, num_heads: int, out: Tensor, lse: Tensor
) -> Tensor:
    a = _Eager(qkv, table, offsets, num_heads)
    do, out, lse = _heads(grad, num_heads), _heads(out, num_heads), lse.flatten(1)
    dq, dk, dv = (torch.zeros_like(a.v) for _ in range(3))
    for s in a.segments:
        p = torch.exp2(a.scores(s) - lse[:, s, None])
        dv[:, s] = a.rounded(p).mT @ do[:, s]
        dp = do[:, s] @ a.v[:, s].mT
        ds = a.rounded(p * (dp - (out[:, s] * do[:, s]).sum(-1, keepdim=True)))
        dq[:, s] = ds @ a.k[:, s] * a.scale
        dk[:, s] = ds.mT @ a.q[:, s] * a.scale
    dqkv = torch.cat([_packed(x, qkv) for x in (dq, dk, dv)], -1)
    return _turn(dqkv, table, num_heads, transpose=True)


def _objections(qkv: Tensor | None = None, *args: Any) -> list[str]:
    """Those of the kernels, to a call of qkv, table, offsets and heads."""
    if qkv is None:
        return _triton.objections()
    table, offsets, num_heads = args[:3]
    return _triton.objections(qkv, table, offsets) + width_objections(qkv.dtype, qkv.shape[-1] // (3 * num_heads))


def width_objections(dtype: torch.dtype, channels: int) -> list[str]:
    """Why the kernels do not support heads of so many channels in this dtype."""
    most = MOST_CHANNELS.get(dtype.itemsize, 0)
    return [f"triton supports at most {most} channels a head in {dtype}, not {channels}"] if 0 < most < channels else []


@_backend.register("packed_attention", "triton", _objections)
def _kernel(qkv: Tensor, table: Tensor | None, offsets: Tensor, num_heads: int) -> tuple[Tensor, Tensor]:
    table = None if table is None else table.contiguous()
    tensors = qkv.contiguous(), table, offsets.contiguous()
    return _triton.launch("packed_attention", "forward", qkv, *tensors, num_heads)


@_backend.register("packed_attention_backward", "triton", lambda *args: _objections(*args[1:]))
def _kernel_backward(
    grad: Tensor, qkv: Tensor, table: Tensor | None, offsets: Tensor, num_heads: int, out: Tensor, lse: Tensor
) -> Tensor:
    table = None if table is None else table.contiguous()
    tensors = grad.contiguous(), qkv.contiguous(), table, offsets.contiguous()
    return _triton.launch("packed_attention", "backward", qkv, *tensors, num_heads, out.contiguous(), lse.contiguous())


_ARGUMENTS = "Tensor qkv, Tensor? table, Tensor offsets, int num_heads"


@_backend.define("packed_attention", _ARGUMENTS, "(Tensor, Tensor)")
def _packed_attention(qkv: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    """The result, and the base-2 logarithms of the softmax's sums [H,B,K], which the backward reads."""
    _check_order(args[1], qkv.shape[0] * qkv.shape[1])
    return _backend.call("packed_attention", qkv, *args)


@_backend.define("packed_attention_backward", f"Tensor grad, {_ARGUMENTS}, Tensor out, Tensor lse")
def _packed_attention_backward(*args: Any) -> Tensor:
    return _backend.call("packed_attention_backward", *args)


@_packed_attention.register_fake
def _(qkv: Tensor, table: Tensor | None, offsets: Tensor, num_heads: int) -> tuple[Tensor, Tensor]:
    b, k, e3 = qkv.shape
    dtype = torch.promote_types(qkv.dtype, torch.float32)
    return qkv.new_empty(b, k, e3 // 3), qkv.new_empty(num_heads, b, k, dtype=dtype)


@_packed_attention_backward.register_fake
def _(grad: Tensor, qkv: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(qkv, memory_format=torch.contiguous_format)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    qkv, table, offsets, ctx.num_heads = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(qkv, table, offsets, *output)


def _backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor, None, None, None]:
    qkv, table, offsets, out, lse = ctx.saved_tensors
    return _packed_attention_backward(grad, qkv, table, offsets, ctx.num_heads, out, lse), None, None, None


_backend.register_gradient(_packed_attention, _backward, _save)
