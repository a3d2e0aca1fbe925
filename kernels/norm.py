"""target_norm on the GPU: LayerNorm without affine of rows of E channels, E = D / levels; forward and backward."""

from __future__ import annotations

import torch
import triton
import triton.language as tl


@triton.jit
def _standardised(x_ptr, at, inside, E, eps):
    """Rows [ROWS,BLOCK] of x in float32, standardised, and the reciprocal deviation of each."""
    x = tl.load(x_ptr + at, mask=inside, other=0.0).to(tl.float32)
    for _ in tl.static_range(2):  # again: `/` is approximate on a GPU, and an ulp of a mean far from 0 is a lot
        x = tl.where(inside, x - (tl.sum(x, 1) / E)[:, None], 0.0)
    rstd = tl.rsqrt(tl.sum(x * x, 1) / E + eps)
    return x * rstd[:, None], rstd


@triton.jit(do_not_specialize=["rows"])  # it changes from step to step
def _norm(
    x_ptr,  # [rows, E]
    grad_ptr,  # [rows, E], read if BACKWARD
    out_ptr,  # [rows, E]
    rows,
    E,
    eps,
    BACKWARD: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,  # rows of a program; channels, at least E
):
    """Mean and variance in two steps in registers, computed anew BACKWARD. Floor, and what it moves: x (and grad) read
    once, out written once.
    """
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    c = tl.arange(0, BLOCK)[None, :]
    at, inside = row * E + c, (row < rows) & (c < E)
    if BACKWARD:
        grad = tl.load(grad_ptr + at, mask=inside, other=0.0).to(tl.float32)  # before x: both are on the way at once
    x, rstd = _standardised(x_ptr, at, inside, E, eps)
    if BACKWARD:
        mean, dot = tl.sum(grad, 1) / E, tl.sum(grad * x, 1) / E
        x = rstd[:, None] * (grad - mean[:, None] - x * dot[:, None])
    tl.store(out_ptr + at, x.to(out_ptr.dtype.element_ty), mask=inside)


def _choice(channels: int) -> tuple[dict, int]:
    """Compile-time arguments and warps: about 2048 elements in registers per 4 warps, longer rows get more warps."""
    block = triton.next_power_of_2(channels)
    return dict(ROWS=max(1, 2048 // block), BLOCK=block), min(16, max(4, block // 512))


def target_norm(h: torch.Tensor, grad: torch.Tensor | None, levels: int, eps: float, out: torch.Tensor) -> None:
    """``h`` [...,D] normalised into ``out``, or its gradient given that of the result; all contiguous."""
    channels = h.shape[-1] // levels
    rows = h.numel() // channels
    if not rows:
        return
    blocks, warps = _choice(channels)
    backward, grad = grad is not None, h if grad is None else grad
    grid = (triton.cdiv(rows, blocks["ROWS"]),)
    _norm[grid](h, grad, out, rows, channels, eps, BACKWARD=backward, **blocks, num_warps=warps)


def variants() -> dict[str, dict]:
    """The builds that benchmarks/aot.py compiles."""

    def one(backward: bool, dtype: str, channels: int) -> dict:
        blocks, warps = _choice(channels)
        tensors = dict.fromkeys(("x_ptr", "grad_ptr", "out_ptr"), dtype)
        signature = {**tensors, "rows": "i32", "E": "i32", "eps": "fp32"}
        constexprs = {"BACKWARD": backward, **blocks}
        return dict(fn=_norm, constexprs=constexprs, num_warps=warps, aligned=[*tensors, "E"], signature=signature)

    return {
        "forward_768_bf16": one(False, "*bf16", 768),
        "forward_1664_fp32": one(False, "*fp32", 1664),
        "backward_768_bf16": one(True, "*bf16", 768),
        "backward_1664_fp32": one(True, "*fp32", 1664),
        "backward_24_fp32": one(True, "*fp32", 24),
        "backward_6656_bf16": one(True, "*bf16", 6656),
    }
