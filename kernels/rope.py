"""rope3d on the GPU: queries and keys turned and values copied in one pass, functional or in place.

B batch, K tokens, H heads, D channels of a head, R <= D rotated channels; table rows [2,R], cosines then sines.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl


@triton.jit(do_not_specialize=["period"])  # it changes from step to step
def _rope3d(
    x_ptr,  # [tokens, 3*H*D], tokens = B*K
    table_ptr,  # [period, 2, R] float32, period = K or B*K
    out_ptr,  # like x, or x itself
    period,
    H: tl.constexpr,
    D: tl.constexpr,
    R: tl.constexpr,
    ROWS: tl.constexpr,  # heads to visit: 3*H, or 2*H in place
    STORED: tl.constexpr,  # channels to write: D, or R in place
    TRANSPOSE: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_P: tl.constexpr,  # heads at a time; channel pairs, at least D/2
):
    """One program per token. Floor: x and table once, out once (in place: the 2*H*R rotated channels and the table).

    Moves just that, counted in sectors of 32 bytes: a token's row of the table is for all its heads.
    """
    token = tl.program_id(0).to(tl.int64)
    c = tl.arange(0, 2 * BLOCK_P)
    angles = table_ptr + (token % period) * (2 * R) + c
    cos0, cos1 = tl.split(tl.reshape(tl.load(angles, mask=c < R, other=1.0), (BLOCK_P, 2)))
    sin0, sin1 = tl.split(tl.reshape(tl.load(angles + R, mask=c < R, other=0.0), (BLOCK_P, 2)))
    if TRANSPOSE:
        sin0, sin1 = -sin1, -sin0
    base = token * (3 * H * D)
    for first in tl.static_range(0, ROWS, BLOCK_H):
        row = first + tl.arange(0, BLOCK_H)[:, None]
        at = base + row * D + c[None, :]
        x = tl.load(x_ptr + at, mask=(row < ROWS) & (c[None, :] < STORED), other=0.0).to(tl.float32)
        a, b = tl.split(tl.reshape(x, (BLOCK_H, BLOCK_P, 2)))
        turned = tl.join(a * cos0[None, :] - b * sin0[None, :], b * cos1[None, :] + a * sin1[None, :])
        turned = tl.reshape(turned, (BLOCK_H, 2 * BLOCK_P))
        turned = tl.where((row < 2 * H) & (c[None, :] < R), turned, x)
        tl.store(out_ptr + at, turned.to(out_ptr.dtype.element_ty), mask=(row < ROWS) & (c[None, :] < STORED))


def _choice(heads: int, channels: int, rotated: int, in_place: bool) -> dict:
    """The compile-time arguments but TRANSPOSE: about 1024 elements at a time, 8 a thread."""
    pairs = triton.next_power_of_2(max(channels, 2)) // 2
    rows = (2 if in_place else 3) * heads
    stored = rotated if in_place else channels
    shape = dict(H=heads, D=channels, R=rotated, ROWS=rows, STORED=stored, BLOCK_P=pairs)
    return shape | dict(BLOCK_H=min(triton.next_power_of_2(rows), max(1, 512 // pairs)))


def rope3d(qkv: torch.Tensor, table: torch.Tensor, num_heads: int, transpose: bool, out: torch.Tensor) -> None:
    """``qkv`` [B,K,3*H*D] turned into ``out``, which may be ``qkv``; everything contiguous."""
    b, k, width = qkv.shape
    if not qkv.numel() or not table.shape[-1] and out is qkv:
        return
    choice = _choice(num_heads, width // (3 * num_heads), table.shape[-1], out is qkv)
    period = k if table.dim() == 3 else b * k
    _rope3d[(b * k,)](qkv, table, out, period, TRANSPOSE=transpose, **choice, num_warps=4)


def variants() -> dict[str, dict]:
    """The builds that benchmarks/aot.py compiles."""

    def one(dtype: str, transpose: bool, *shape) -> dict:
        pointers = dict(x_ptr=dtype, table_ptr="*fp32", out_ptr=dtype)
        constexprs = dict(TRANSPOSE=transpose, **_choice(*shape))
        signature = pointers | {"period": "i32"}
        return dict(fn=_rope3d, signature=signature, constexprs=constexprs, num_warps=4, aligned=[*pointers])

    return {
        "base_bf16": one("*bf16", False, 12, 64, 60, False),
        "base_bf16_transpose": one("*bf16", True, 12, 64, 60, False),
        "base_bf16_in_place": one("*bf16", False, 12, 64, 60, True),
        "base_fp32": one("*fp32", False, 12, 64, 60, False),
        "gigantic_bf16": one("*bf16", False, 16, 104, 102, False),
        "small_odd_fp32": one("*fp32", False, 3, 20, 18, False),
    }
