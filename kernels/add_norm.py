"""Residual addition and LayerNorm of a transformer block in one pass, and the backward of both in one.

Legend: E channels of a row.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl


@triton.jit(do_not_specialize=["rows"])  # it changes from step to step
def _add_norm(
    x_ptr,  # [rows, E]
    y_ptr,  # [rows, E], read if ADD
    shift_ptr,  # [E], read if SHIFT
    weight_ptr,  # [E]
    bias_ptr,  # [E]
    sum_ptr,  # [rows, E], written if ADD
    out_ptr,  # rows of `stride` elements
    mean_ptr,  # float32 [rows]
    rstd_ptr,  # float32 [rows]
    rows,
    stride,
    E,
    eps,
    ADD: tl.constexpr,
    SHIFT: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,  # rows of a program; channels, at least E
):
    """What is normalised is the sum as it is stored. Floor, and what it moves: x and y read once, sum and out written
    once.
    """
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    c = tl.arange(0, BLOCK)
    here, some = row < rows, c < E
    inside = here[:, None] & some[None, :]
    at = row[:, None] * E + c[None, :]
    x = tl.load(x_ptr + at, mask=inside, other=0.0).to(tl.float32)
    if ADD:
        x += tl.load(y_ptr + at, mask=inside, other=0.0).to(tl.float32)
        if SHIFT:
            x += tl.load(shift_ptr + c, mask=some, other=0.0).to(tl.float32)[None, :]
        stored = x.to(sum_ptr.dtype.element_ty)
        tl.store(sum_ptr + at, stored, mask=inside)
        x = stored.to(tl.float32)
    weight = tl.load(weight_ptr + c, mask=some, other=0.0).to(tl.float32)[None, :]
    bias = tl.load(bias_ptr + c, mask=some, other=0.0).to(tl.float32)[None, :]
    mean = tl.sum(x, 1) / E
    x = tl.where(inside, x - mean[:, None], 0.0)
    rest = tl.sum(x, 1) / E  # again: `/` is approximate on a GPU, and an ulp of a mean far from 0 is a lot
    x = tl.where(inside, x - rest[:, None], 0.0)
    rstd = tl.rsqrt(tl.sum(x * x, 1) / E + eps)
    tl.store(mean_ptr + row, mean + rest, mask=here)
    tl.store(rstd_ptr + row, rstd, mask=here)
    out = x * rstd[:, None] * weight + bias
    tl.store(out_ptr + row[:, None] * stride + c[None, :], out.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["rows"])
def _add_norm_backward(
    grad_ptr,  # rows of `stride` elements
    x_ptr,  # [rows, E], the sum
    rest_ptr,  # [rows, E], the gradient that reaches the sum by itself, read if REST
    weight_ptr,
    bias_ptr,  # [E], read if AGAIN
    mean_ptr,
    rstd_ptr,
    dx_ptr,  # [rows, E]
    again_ptr,  # [rows, E], written if AGAIN: the output of the forward
    partial_ptr,  # float32 [programs, 3, E]: of weight, bias, and the column sums of dx
    rows,
    stride,
    E,
    REST: tl.constexpr,
    AGAIN: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """A program takes every n-th portion of rows, so the sums have one order. ``again`` may be where ``grad`` is.

    Floor, and what it moves: grad, x and rest read once, dx and again written once.
    """
    c = tl.arange(0, BLOCK)[None, :]
    some = c < E
    weight = tl.load(weight_ptr + c, mask=some, other=0.0).to(tl.float32)
    if AGAIN:
        bias = tl.load(bias_ptr + c, mask=some, other=0.0).to(tl.float32)
    of_weight = tl.zeros([ROWS, BLOCK], tl.float32)
    of_bias = tl.zeros([ROWS, BLOCK], tl.float32)
    of_shift = tl.zeros([ROWS, BLOCK], tl.float32)
    first = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    portion = tl.num_programs(0) * ROWS
    for start in range(0, rows, portion):
        row = first + start
        inside = (row < rows) & some
        at = row * E + c
        grad = tl.load(grad_ptr + row * stride + c, mask=inside, other=0.0).to(tl.float32)
        x = tl.load(x_ptr + at, mask=inside, other=0.0).to(tl.float32)
        if REST:
            rest = tl.load(rest_ptr + at, mask=inside, other=0.0).to(tl.float32)
        mean = tl.load(mean_ptr + row, mask=row < rows, other=0.0)
        rstd = tl.load(rstd_ptr + row, mask=row < rows, other=0.0)
        x = (x - mean) * rstd  # not 0 beyond the channels, where grad is
        of_weight += grad * x
        of_bias += grad
        grad *= weight
        dx = rstd * (grad - (tl.sum(grad, 1) / E)[:, None] - x * (tl.sum(grad * x, 1) / E)[:, None])
        if REST:
            dx += rest
        of_shift += dx
        tl.store(dx_ptr + at, dx.to(dx_ptr.dtype.element_ty), mask=inside)
        if AGAIN:
            tl.store(again_ptr + at, (x * weight + bias).to(again_ptr.dtype.element_ty), mask=inside)
    place = tl.program_id(0).to(tl.int64) * 3 * E + tl.arange(0, BLOCK)
    some = tl.arange(0, BLOCK) < E
    tl.store(partial_ptr + place, tl.sum(of_weight, 0), mask=some)
    tl.store(partial_ptr + place + E, tl.sum(of_bias, 0), mask=some)
    tl.store(partial_ptr + place + 2 * E, tl.sum(of_shift, 0), mask=some)


def _choice(channels: int) -> tuple[dict, int]:
    """Compile-time arguments and warps: one row, or several short ones, and 8 elements of it per thread."""
    block = triton.next_power_of_2(channels)
    return dict(ROWS=max(1, 1024 // block), BLOCK=block), min(16, max(4, block // 256))


def programs(rows: int, channels: int, processors: int) -> int:
    """How many programs of the backward share the rows: a few per processor, which hold sums of their own."""
    return max(1, min(triton.cdiv(rows, 4 * _choice(channels)[0]["ROWS"]), 4 * processors))


def add_norm(
    x: torch.Tensor,
    y: torch.Tensor | None,
    shift: torch.Tensor | None,
    weight: torch.Tensor,
    bias: torch.Tensor,
    eps: float,
    total: torch.Tensor | None,
    out: torch.Tensor,
    mean: torch.Tensor,
    rstd: torch.Tensor,
) -> None:
    """``total`` = x + y + shift, and its LayerNorm in ``out`` [rows,E], whose rows may lie apart; else contiguous."""
    rows, channels = x.shape
    if not rows:
        return
    blocks, warps = _choice(channels)
    add, shifted = y is not None, shift is not None
    _add_norm[(triton.cdiv(rows, blocks["ROWS"]),)](
        x,
        x if y is None else y,
        weight if shift is None else shift,
        weight,
        bias,
        x if total is None else total,
        out,
        mean,
        rstd,
        rows,
        out.stride(0),
        channels,
        eps,
        ADD=add,
        SHIFT=add and shifted,
        **blocks,
        num_warps=warps,
    )


def add_norm_backward(
    grad: torch.Tensor,
    x: torch.Tensor,
    rest: torch.Tensor | None,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    mean: torch.Tensor,
    rstd: torch.Tensor,
    dx: torch.Tensor,
    again: torch.Tensor | None,
    partial: torch.Tensor,
) -> None:
    """``dx`` and ``partial`` [programs,3,E], and the forward's output in ``again``; rows of ``grad`` may lie apart."""
    rows, channels = x.shape
    if not rows:
        partial.zero_()
        return
    blocks, warps = _choice(channels)
    _add_norm_backward[(partial.shape[0],)](
        grad,
        x,
        x if rest is None else rest,
        weight,
        weight if bias is None else bias,
        mean,
        rstd,
        dx,
        dx if again is None else again,
        partial,
        rows,
        grad.stride(0),
        channels,
        REST=rest is not None,
        AGAIN=again is not None,
        **blocks,
        num_warps=warps,
    )


def variants() -> dict[str, dict]:
    """The builds that benchmarks/aot.py compiles."""

    def forward(dtype: str, channels: int, add: bool = True) -> dict:
        blocks, warps = _choice(channels)
        tensors = {**dict.fromkeys(("x_ptr", "y_ptr", "sum_ptr", "out_ptr"), dtype)}
        tensors |= dict.fromkeys(("shift_ptr", "weight_ptr", "bias_ptr", "mean_ptr", "rstd_ptr"), "*fp32")
        signature = {**tensors, "rows": "i32", "stride": "i32", "E": "i32", "eps": "fp32"}
        constexprs = {"ADD": add, "SHIFT": add, **blocks}
        aligned = [*tensors, "stride", "E"]
        return dict(fn=_add_norm, constexprs=constexprs, num_warps=warps, aligned=aligned, signature=signature)

    def backward(dtype: str, channels: int, again: bool = True) -> dict:
        blocks, warps = _choice(channels)
        tensors = dict.fromkeys(("grad_ptr", "x_ptr", "rest_ptr", "dx_ptr", "again_ptr"), dtype)
        tensors |= dict.fromkeys(("weight_ptr", "bias_ptr", "mean_ptr", "rstd_ptr", "partial_ptr"), "*fp32")
        signature = {**tensors, "rows": "i32", "stride": "i32", "E": "i32"}
        constexprs = {"REST": True, "AGAIN": again, **blocks}
        aligned = [*tensors, "stride", "E"]
        return dict(fn=_add_norm_backward, constexprs=constexprs, num_warps=warps, aligned=aligned, signature=signature)

    return {
        "forward_768_bf16": forward("*bf16", 768),
        "forward_256_bf16": forward("*bf16", 256),
        "forward_1664_bf16": forward("*bf16", 1664),
        "forward_level_768_bf16": forward("*bf16", 768, add=False),
        "backward_768_bf16": backward("*bf16", 768),
        "backward_256_bf16": backward("*bf16", 256),
        "backward_1664_bf16": backward("*bf16", 1664),
        "backward_level_768_bf16": backward("*bf16", 768, again=False),
    }
