"""3-D rotary position embedding of packed queries and keys.

Legend: B batch, K tokens, H heads, d channels of a head, E = H*d, R <= d rotated channels.

Table layout: float32 ``[K, 2, R]``, or ``[B, K, 2, R]`` where the samples hold different tokens; ``table[..., 0, :]``
are cosines, ``table[..., 1, :]`` sines, one per *channel*. Channels c >= R pass unchanged, the others pair up as
(2i, 2i+1):

    out[2i]   = x[2i]   * cos[2i]   - x[2i+1] * sin[2i]
    out[2i+1] = x[2i+1] * cos[2i+1] + x[2i]   * sin[2i+1]

In variant ``v2.1`` both channels of a pair carry the same angle (a rotation); in ``v2`` the angles of an axis are
repeated in halves, so the two of a pair differ and the map is linear but no rotation. The difference is in the table,
not in this op.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vjepa_fast.ops import _backend, _check, _cpp, _triton


def rope3d(qkv: Tensor, table: Tensor, num_heads: int) -> Tensor:
    """Rotate the queries and keys of ``qkv`` by their positions (V-JEPA 2, arXiv:2506.09985, section 2.1).

    Args:
        qkv: [B,K,3*E], any floating dtype: as the packed linear layer returns it (q, k, v; in each, heads; channels).
        table: float32 [K,2,R] or [B,K,2,R], cosines and sines (see the module). No gradient reaches it.
        num_heads: H, a divisor of E.

    Returns:
        A new tensor [B,K,3*E] of qkv's dtype; computed in promote_types(dtype, float32).

    Raises:
        ValueError: a shape or dtype does not fit; the message names the argument.

    Floor: qkv and table read once, [B,K,3*E] written once (the values are copied in the same pass).
    """
    check_rope("rope3d", qkv, table, num_heads)
    return _rope3d(qkv, table, num_heads)


def rope3d_(qkv: Tensor, table: Tensor, num_heads: int) -> Tensor:
    """``rope3d`` in place, without autograd, for the target encoder. Returns ``qkv``.

    Floor: table read once, the 2*H*R rotated channels of a token read and written once.
    """
    check_rope("rope3d_", qkv, table, num_heads)
    if qkv.requires_grad and torch.is_grad_enabled():
        raise ValueError("rope3d_: qkv: expected a tensor without gradient, got one that requires grad; use rope3d")
    _rope3d_inplace(qkv, table, num_heads)
    return qkv


def check_rope(op: str, qkv: Tensor, table: Tensor | None, num_heads: int) -> None:
    """``qkv`` and ``table`` fit each other, as `rope3d` takes them; without a table qkv alone is looked at."""
    ok = qkv.dim() == 3 and qkv.is_floating_point() and num_heads > 0 and qkv.shape[2] % (3 * num_heads) == 0
    _check.require(ok, op, "qkv", f"a floating tensor [B,K,3*E] with E a multiple of num_heads={num_heads}", qkv)
    if table is None:
        return
    b, k, e3 = qkv.shape
    d = e3 // (3 * num_heads)
    ok = table.dtype == torch.float32 and table.dim() in (3, 4) and table.shape[-3:-1] == (k, 2)
    ok = ok and table.shape[-1] % 2 == 0 and table.shape[-1] <= d and (table.dim() == 3 or table.shape[0] == b)
    if not ok:  # formatting a size would pin it under torch.compile: one graph per K
        _check.require(ok, op, "table", f"float32 [{k},2,R] or [{b},{k},2,R] with R even and at most {d}", table)


def _turn(x_BKPHd: Tensor, table: Tensor, transpose: bool) -> Tensor:
    """The rotated channels of queries and keys, in the compute dtype; ``transpose`` gives the gradient's map."""
    x = x_BKPHd[:, :, :2, :, : table.shape[-1]]
    x = x.to(torch.promote_types(x.dtype, torch.float32)).contiguous()
    cos, sin = table.unbind(-2)
    cos, sin = (t[..., None, None, :] for t in (cos, sin))  # over q/k and heads
    if transpose:
        return torch.addcmul(_quarter_turn(x * sin), x, cos, value=-1).neg_()
    return torch.addcmul(x * cos, _quarter_turn(x), sin)


def _quarter_turn(x: Tensor) -> Tensor:
    """(a, b) -> (-b, a) for each pair of channels."""
    pairs = torch.view_as_complex(x.unflatten(-1, (-1, 2)))
    return torch.view_as_real(pairs * 1j).flatten(-2)


def _split(qkv: Tensor, num_heads: int) -> Tensor:
    return qkv.unflatten(-1, (3, num_heads, -1))


@_backend.register("rope3d", "eager")
def _eager(qkv: Tensor, table: Tensor, num_heads: int, transpose: bool, out: Tensor) -> None:
    turned = _turn(_split(qkv, num_heads), table, transpose).to(qkv.dtype)
    if out is not qkv:
        out.copy_(qkv)
    _split(out, num_heads)[:, :, :2, :, : table.shape[-1]] = turned


def _in_place(*args: Any) -> list[str]:
    """The kernels turn dense memory; another input is copied, but in place there is nowhere to copy it."""
    return ["in place, qkv must be contiguous"] if args and not args[-1].is_contiguous() else []


def _cpp_objections(*args: Any) -> list[str]:
    reasons = _cpp.objections(*args[:2]) + _in_place(*args)
    return reasons + (_cpp.dtype_objections(args[0]) if args else [])


@_backend.register("rope3d", "cpp", _cpp_objections)
def _cpp_rope3d(qkv: Tensor, table: Tensor, num_heads: int, transpose: bool, out: Tensor) -> None:
    torch.ops.vjepa_fast_cpp.rope3d(qkv, table, num_heads, transpose, out)


@_backend.register("rope3d", "triton", lambda *args: _triton.objections(*args[:2]) + _in_place(*args))
def _triton_rope3d(qkv: Tensor, table: Tensor, num_heads: int, transpose: bool, out: Tensor) -> None:
    _triton.launch("rope", "rope3d", qkv, qkv.contiguous(), table.contiguous(), num_heads, transpose, out)


def _run(qkv: Tensor, table: Tensor, num_heads: int, transpose: bool) -> Tensor:
    out = torch.empty_like(qkv, memory_format=torch.contiguous_format)
    _backend.call("rope3d", qkv, table, num_heads, transpose, out)
    return out


@torch.library.custom_op("vjepa_fast::rope3d", mutates_args=())
def _rope3d(qkv: Tensor, table: Tensor, num_heads: int) -> Tensor:
    return _run(qkv, table, num_heads, False)


@torch.library.custom_op("vjepa_fast::rope3d_transpose", mutates_args=())
def _rope3d_transpose(grad: Tensor, table: Tensor, num_heads: int) -> Tensor:
    return _run(grad, table, num_heads, True)


@torch.library.custom_op("vjepa_fast::rope3d_", mutates_args=("qkv",))
def _rope3d_inplace(qkv: Tensor, table: Tensor, num_heads: int) -> None:
    _backend.call("rope3d", qkv, table, num_heads, False, qkv)


@_rope3d.register_fake
@_rope3d_transpose.register_fake
def _(qkv: Tensor, table: Tensor, num_heads: int) -> Tensor:
    return torch.empty_like(qkv, memory_format=torch.contiguous_format)


@_rope3d_inplace.register_fake
def _(qkv: Tensor, table: Tensor, num_heads: int) -> None:
    return None


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, table, ctx.num_heads = inputs
    ctx.save_for_backward(table)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
    return _rope3d_transpose(grad, *ctx.saved_tensors, ctx.num_heads), None, None


def _transpose_backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
    return _rope3d(grad, *ctx.saved_tensors, ctx.num_heads), None, None


_backend.register_gradient(_rope3d, _backward, _save)
_backend.register_gradient(_rope3d_transpose, _transpose_backward, _save)
