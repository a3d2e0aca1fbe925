"""Matrix products of a feed-forward whose last step is GELU or its slope, and the slope as a pass of its own.

Legend: M rows, K inputs and N outputs of a product.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor


@triton.jit
def _normal(x):
    """The normal distribution at x and x times its density, from one exponential (absolute error 1e-7).

    Tail by rational arguments: Abramowitz and Stegun, Handbook of Mathematical Functions, 7.1.26.
    """
    size = tl.abs(x) * 0.7071067811865476
    e = tl.exp2(size * size * -1.4426950408889634)  # exp(-x^2 / 2)
    t = 1.0 / (1.0 + 0.3275911 * size)
    tail = 1.061405429 * t - 1.453152027
    tail = tail * t + 1.421413741
    tail = tail * t - 0.284496736
    tail = 0.5 * e * t * (tail * t + 0.254829592)
    return tl.where(x > 0, 1.0 - tail, tail), 0.3989422804014327 * x * e


@triton.jit
def _tile(tile, M, N, TILE_M: tl.constexpr, TILE_N: tl.constexpr, GROUP: tl.constexpr):
    """Row and column of a tile: GROUP rows of tiles at a time, so that their operands stay in the L2 cache."""
    wide = tl.cdiv(N, TILE_N)
    group = tile // (GROUP * wide)
    high = min(tl.cdiv(M, TILE_M) - group * GROUP, GROUP)
    inner = tile % (GROUP * wide)
    return group * GROUP + inner % high, inner // high


@triton.jit(do_not_specialize=["M"])  # it changes from step to step
def _gelu_product(
    a,  # [M, K]
    b,  # [N, K], or if BACKWARD [K, N]
    bias_ptr,  # [N], read unless BACKWARD
    hidden,  # [M, N], before the GELU: written if KEEP, read if BACKWARD
    out,  # [M, N]: GELU
    slope,  # [M, N], written if BACKWARD: the gradient before the GELU
    partial_ptr,  # float32 [tiles of M, N], written if BACKWARD: column sums of `slope`
    M,
    N,
    K,
    BACKWARD: tl.constexpr,
    KEEP: tl.constexpr,
    TMA: tl.constexpr,  # the matrices come as tensor descriptors, else as pointers
    TILE_M: tl.constexpr,
    TILE_N: tl.constexpr,
    TILE_K: tl.constexpr,
    PARTS: tl.constexpr,  # 4 or 8
    GROUP: tl.constexpr,
):
    """GELU(a b^T + bias), or with a the gradient after the next layer and b its weight, the gradient before the GELU
    and GELU(hidden).

    A program takes every n-th tile. Floor, and what it moves beside the operands: each [M,N] once.
    """
    tiles = tl.cdiv(M, TILE_M) * tl.cdiv(N, TILE_N)
    for tile in tl.range(tl.program_id(0), tiles, tl.num_programs(0), flatten=TMA):
        tile_m, tile_n = _tile(tile, M, N, TILE_M, TILE_N, GROUP)
        m, n = tile_m * TILE_M, tile_n * TILE_N
        acc = tl.zeros([TILE_M, TILE_N], tl.float32)
        rows, columns = tl.arange(0, TILE_M)[:, None], n + tl.arange(0, TILE_N)[None, :]
        for k in range(0, K, TILE_K):
            if TMA:
                x = a.load([m, k])
                y = b.load([k, n]) if BACKWARD else b.load([n, k]).T
            else:
                ks = k + tl.arange(0, TILE_K)
                own = a + m.to(tl.int64) * K
                x = tl.load(own + rows * K + ks[None, :], mask=(rows < M - m) & (ks[None, :] < K), other=0.0)
                at = ks[:, None] * N + columns if BACKWARD else columns * K + ks[:, None]
                y = tl.load(b + at, mask=(ks[:, None] < K) & (columns < N), other=0.0)
            acc = tl.dot(x, y, acc)
        for part in tl.static_range(PARTS):  # a share of the columns at a time, which takes fewer registers
            share = _half(_half(acc, part * 2 // PARTS), part * 4 // PARTS % 2)
            if PARTS == 8:
                share = _half(share, part % 2)
            at_n = n + part * (TILE_N // PARTS)
            _finish(share, bias_ptr, hidden, out, slope, partial_ptr, tile_m, m, at_n, M, N, BACKWARD, KEEP, TMA)


@triton.jit
def _half(x, second: tl.constexpr):
    """The first or the second half of the columns."""
    left, right = tl.split(tl.permute(tl.reshape(x, (x.shape[0], 2, x.shape[1] // 2)), (0, 2, 1)))
    if second:
        return right
    return left


@triton.jit
def _finish(
    acc,
    bias_ptr,
    hidden,
    out,
    slope,
    partial_ptr,
    tile_m,
    m,
    n,
    M,
    N,
    BACKWARD: tl.constexpr,
    KEEP: tl.constexpr,
    TMA: tl.constexpr,
):
    """The epilogue of these sums, which begin at row m and column n."""
    rows = tl.arange(0, acc.shape[0])[:, None]
    columns = n + tl.arange(0, acc.shape[1])
    at = rows * N + columns[None, :]
    own = m.to(tl.int64) * N
    inside = (rows < M - m) & (columns < N)[None, :]
    if BACKWARD:
        if TMA:
            x = hidden.load([m, n]).to(tl.float32)
        else:
            x = tl.load(hidden + own + at, mask=inside, other=0.0).to(tl.float32)
        share, dense = _normal(x)
        acc *= share + dense
        tl.store(partial_ptr + tile_m.to(tl.int64) * N + columns, tl.sum(acc, 0), mask=columns < N)
        if TMA:
            slope.store([m, n], acc.to(slope.dtype))
        else:
            tl.store(slope + own + at, acc.to(slope.dtype.element_ty), mask=inside)
        acc = x * share
    else:
        acc += tl.load(bias_ptr + columns, mask=columns < N, other=0.0).to(tl.float32)[None, :]
        if KEEP:  # the GELU is of what is kept, which is what the backward has
            if TMA:
                kept = acc.to(hidden.dtype)
                hidden.store([m, n], kept)
            else:
                kept = acc.to(hidden.dtype.element_ty)
                tl.store(hidden + own + at, kept, mask=inside)
            acc = kept.to(tl.float32)
        share, _ = _normal(acc)
        acc *= share
    if TMA:
        out.store([m, n], acc.to(out.dtype))
    else:
        tl.store(out + own + at, acc.to(out.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["M"])
def _gelu_slope(
    grad_ptr,  # [M, N], the gradient after the GELU
    hidden_ptr,  # [M, N]
    slope_ptr,  # [M, N], may be where grad is
    out_ptr,  # [M, N]
    partial_ptr,  # float32 [programs of M, N]
    M,
    N,
    TALL: tl.constexpr,  # rows of a program
    ROWS: tl.constexpr,  # of them at a time
    COLUMNS: tl.constexpr,
):
    """What the epilogue of `_gelu_product` does if BACKWARD, of a product that another library made."""
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    some = columns < N
    sums = tl.zeros([ROWS, COLUMNS], tl.float32)
    first = tl.program_id(0).to(tl.int64) * TALL
    for start in range(0, TALL, ROWS):
        rows = first + start + tl.arange(0, ROWS)[:, None]
        inside = (rows < M) & some[None, :]
        at = rows * N + columns[None, :]
        x = tl.load(hidden_ptr + at, mask=inside, other=0.0).to(tl.float32)
        grad = tl.load(grad_ptr + at, mask=inside, other=0.0).to(tl.float32)
        share, dense = _normal(x)
        grad *= share + dense
        sums += grad
        tl.store(slope_ptr + at, grad.to(slope_ptr.dtype.element_ty), mask=inside)
        tl.store(out_ptr + at, (x * share).to(out_ptr.dtype.element_ty), mask=inside)
    tl.store(partial_ptr + tl.program_id(0).to(tl.int64) * N + columns, tl.sum(sums, 0), mask=some)


class Tiles(NamedTuple):
    """A way to cut a product: rows, columns and depth of a tile, warps, stages, programs per processor."""

    m: int
    n: int
    k: int
    warps: int
    stages: int
    programs: int


# One large tile per processor, or two whose products and epilogues fill each other's gaps.
WITH_TMA = (Tiles(128, 256, 64, 8, 3, 1), Tiles(128, 128, 64, 4, 3, 2))
WITHOUT = (Tiles(128, 256, 32, 8, 3, 1), Tiles(128, 128, 32, 8, 4, 2))
_PARTS = {False: 4, True: 8}  # forward, backward: the fewest that do without spills
_TALL, _PASS = 128, dict(ROWS=16, COLUMNS=128)


def cuts(tma: bool) -> Sequence[Tiles]:
    """The ways that are tried, the first where nothing can be measured."""
    return WITH_TMA if tma else WITHOUT


def partials(rows: int, tiles: Tiles | None) -> int:
    """First dimension of ``partial``: of `product` with these tiles, or of `slope`."""
    return triton.cdiv(rows, tiles.m if tiles else _TALL)


def product(
    a: torch.Tensor,
    b: torch.Tensor,
    bias: torch.Tensor | None,
    hidden: torch.Tensor | None,
    out: torch.Tensor,
    slope: torch.Tensor | None,
    partial: torch.Tensor | None,
    tiles: Tiles,
    tma: bool,
    processors: int,
) -> None:
    """``_gelu_product`` on contiguous matrices; the backward where there is a ``slope``."""
    (rows, depth), columns = a.shape, out.shape[1]
    if not rows:
        return
    backward, keep = slope is not None, hidden is not None
    matrices: list[Any] = [a, b, out if hidden is None else hidden, out, out if slope is None else slope]
    if tma:
        operand = [tiles.k, tiles.n] if backward else [tiles.n, tiles.k]
        result = [tiles.m, tiles.n // _PARTS[backward]]
        blocks = [[tiles.m, tiles.k], operand, result, result, result]
        matrices = [TensorDescriptor.from_tensor(x, block) for x, block in zip(matrices, blocks)]
    grid = min(triton.cdiv(rows, tiles.m) * triton.cdiv(columns, tiles.n), tiles.programs * processors)
    _gelu_product[(grid,)](
        matrices[0],
        matrices[1],
        bias if bias is not None else out,
        *matrices[2:],
        partial if partial is not None else out,
        rows,
        columns,
        depth,
        BACKWARD=backward,
        KEEP=keep and not backward,
        TMA=tma,
        TILE_M=tiles.m,
        TILE_N=tiles.n,
        TILE_K=tiles.k,
        PARTS=_PARTS[backward],
        GROUP=8,
        num_warps=tiles.warps,
        num_stages=tiles.stages,
    )


def slope(
    grad: torch.Tensor, hidden: torch.Tensor, slope: torch.Tensor, out: torch.Tensor, partial: torch.Tensor
) -> None:
    """``_gelu_slope`` on contiguous matrices."""
    rows, columns = hidden.shape
    if rows:
        grid = (triton.cdiv(rows, _TALL), triton.cdiv(columns, _PASS["COLUMNS"]))
        _gelu_slope[grid](grad, hidden, slope, out, partial, rows, columns, TALL=_TALL, **_PASS, num_warps=4)


def variants() -> dict[str, dict]:
    """The builds that benchmarks/aot.py compiles; those with tensor descriptors from sm_90 on."""

    def one(backward: bool, tma: bool, tiles: Tiles, keep: bool = True) -> dict:
        result = [tiles.m, tiles.n // _PARTS[backward]]
        operand = [tiles.k, tiles.n] if backward else [tiles.n, tiles.k]
        blocks = {"a": [tiles.m, tiles.k], "b": operand, "hidden": result, "out": result, "slope": result}
        matrices = {name: f"tensordesc<bf16{block}>" if tma else "*bf16" for name, block in blocks.items()}
        pointers = {"bias_ptr": "*fp32", "partial_ptr": "*fp32"}
        constexprs = dict(BACKWARD=backward, KEEP=keep and not backward, TMA=tma, PARTS=_PARTS[backward], GROUP=8)
        constexprs |= dict(TILE_M=tiles.m, TILE_N=tiles.n, TILE_K=tiles.k)
        return dict(
            fn=_gelu_product,
            constexprs=constexprs,
            num_warps=tiles.warps,
            num_stages=tiles.stages,
            aligned=[*([] if tma else matrices), *pointers, "N", "K"],
            signature={**matrices, **pointers, "M": "i32", "N": "i32", "K": "i32"},
            least=90 if tma else 80,
        )

    found = {}
    for tma in (True, False):
        for tiles in cuts(tma):
            where = f"{'tma' if tma else 'pointers'}_{tiles.m}x{tiles.n}_{tiles.warps}"
            found[f"forward_{where}"] = one(False, tma, tiles)
            found[f"backward_{where}"] = one(True, tma, tiles)
    found["inference_tma_128x256_8"] = one(False, True, WITH_TMA[0], keep=False)
    tensors = dict.fromkeys(("grad_ptr", "hidden_ptr", "slope_ptr", "out_ptr"), "*bf16") | {"partial_ptr": "*fp32"}
    found["slope_bf16"] = dict(
        fn=_gelu_slope,
        constexprs={"TALL": _TALL, **_PASS},
        aligned=[*tensors, "N"],
        signature={**tensors, "M": "i32", "N": "i32"},
    )
    return found
