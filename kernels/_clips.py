"""What the kernels that read clips share: means over the cells of the token grid.

Clips [B,C,F,Y,X] of any strides, cut into a grid (T,H,W). A row of a cell is what lies together in memory, so a block's
last axis runs along it and a thread takes up to 16 bytes.
"""

from __future__ import annotations

import triton
import triton.language as tl

BLOCK = 2048  # pixels of a program at a time: 16 per thread, 16 bytes of a uint8 clip
WARPS = 4
OPTIONS = {"num_warps": WARPS, "enable_fp_fusion": False}  # rounded as in eager code


@triton.jit
def pool_cells(
    clip,
    scale,
    shift,
    out,
    n_t,
    n_h,
    n_w,
    n_f,
    n_y,
    n_x,
    step_b,
    step_c,
    step_f,
    step_y,
    step_x,
    C: tl.constexpr,
    CELL_T: tl.constexpr,
    CELL_Y: tl.constexpr,
    CELL_X: tl.constexpr,
    EVEN: tl.constexpr,
    ROWS: tl.constexpr,
    TOKENS: tl.constexpr,
    COLS: tl.constexpr,
    CHANGE: tl.constexpr,
    NORMALIZE: tl.constexpr,
):
    """Means over the cells of the grid, of at most CELL_T x CELL_Y x CELL_X pixels (EVEN: just CELL_X along x).

    CHANGE: of the absolute difference to the frame before (frame 0 takes that of frame 1), weighted by ``scale`` and
    summed over channels, out [B,T,H,W]. Else of the pixels, normalised, out [B,T,H,W,C]. A program takes TOKENS
    neighbours along w, so that it reads whole lines. Floor: the clip read once. Changes ask for every frame twice, the
    second time soon enough to find it in the cache.
    """
    band = tl.program_id(0)  # (b, t, h)
    t, h = band // n_h % n_t, band % n_h
    w = tl.program_id(1) * TOKENS + tl.arange(0, TOKENS)
    # the pixels of TOKENS cells on one axis, so that neighbouring threads take neighbouring pixels
    x = tl.arange(0, TOKENS * COLS)
    cell = tl.program_id(1) * TOKENS + x // COLS
    x = x % COLS
    t0, t1 = t * n_f // n_t, ((t + 1) * n_f + n_t - 1) // n_t
    y0, y1 = h * n_y // n_h, ((h + 1) * n_y + n_h - 1) // n_h
    if EVEN:
        column = cell * CELL_X + x
        within = (cell < n_w) & (x < CELL_X)
        n_columns = CELL_X
    else:
        column = cell * n_x // n_w + x
        within = (cell < n_w) & (column < ((cell + 1) * n_x + n_w - 1) // n_w)
        n_columns = ((w + 1) * n_x + n_w - 1) // n_w - w * n_x // n_w
    column = column.to(tl.int64) * step_x
    count = ((t1 - t0) * (y1 - y0) * n_columns).to(tl.float32)
    total = tl.zeros([TOKENS], tl.float32)
    for c in range(C):
        plane = (band // (n_h * n_t)).to(tl.int64) * step_b + tl.full([], c, tl.int64) * step_c
        sums = tl.zeros([TOKENS], tl.float32)
        for start in range(0, CELL_T * CELL_Y, ROWS):
            r = start + tl.arange(0, ROWS)
            f, y = t0 + r // CELL_Y, y0 + r % CELL_Y
            mine = ((f < t1) & (y < y1))[:, None] & within[None, :]
            if CHANGE:
                f = tl.maximum(f, 1)
            at = plane + f.to(tl.int64) * step_f + y.to(tl.int64) * step_y
            pixel = clip + at[:, None] + column[None, :]
            v = tl.load(pixel, mask=mine, other=0).to(tl.float32)
            if CHANGE:
                v = tl.abs(v - tl.load(pixel - step_f, mask=mine, other=0).to(tl.float32))
            sums += tl.sum(tl.sum(tl.reshape(v, [ROWS, TOKENS, COLS]), 2), 0)
        mean = sums / count
        if CHANGE:
            total += mean * tl.load(scale + c)
        else:
            if NORMALIZE:
                mean = mean * tl.load(scale + c) - tl.load(shift + c)
            tl.store(out + (band.to(tl.int64) * n_w + w) * C + c, mean, mask=w < n_w)
    if CHANGE:
        tl.store(out + band.to(tl.int64) * n_w + w, total, mask=w < n_w)


def _cell(size: int, cells: int) -> int:
    """The longest of ``cells`` parts of an axis of ``size``; they overlap where it cannot be divided."""
    return max(-(-(i + 1) * size // cells) - i * size // cells for i in range(cells))


def pool_shape(cell_t: int, cell_y: int, cell_x: int, n_w: int) -> dict[str, int]:
    cols = triton.next_power_of_2(cell_x)
    rows = max(1, min(2 * BLOCK // cols, triton.next_power_of_2(cell_t * cell_y)))
    tokens = max(1, min(2 * BLOCK // (cols * rows), triton.next_power_of_2(n_w)))
    return {"CELL_T": cell_t, "CELL_Y": cell_y, "CELL_X": cell_x, "ROWS": rows, "TOKENS": tokens, "COLS": cols}


def launch_pool(clip, scale, shift, out, change: bool) -> None:
    grid, size = out.shape[1:4], clip.shape[2:]
    shape = pool_shape(*map(_cell, size, grid), grid[2])
    if out.numel():
        meta = {"C": clip.shape[1], "EVEN": size[2] % grid[2] == 0, "CHANGE": change, **shape, **OPTIONS}
        pool_cells[(out.shape[0] * grid[0] * grid[1], triton.cdiv(grid[2], shape["TOKENS"]))](
            clip, scale, shift, out, *grid, *size, *clip.stride(), NORMALIZE=not clip.is_floating_point(), **meta
        )


STEPS = {f"step_{axis}": "i64" if axis == "b" else "i32" for axis in "bcfy"}  # types for variants()
GRID = dict.fromkeys(("n_t", "n_h", "n_w", "n_f", "n_y", "n_x"), "i32")
TABLES = {"scale": "*fp32", "shift": "*fp32"}
ALIGNED = ["clip", "scale", "out", *STEPS]


def pool_variant(clip: str, change: bool) -> dict:
    """A build of ``pool_cells`` for benchmarks/aot.py."""
    signature = {"clip": f"*{clip}", **TABLES, "out": "*fp32", **GRID, **STEPS}
    constexprs = {"C": 3, "EVEN": True, "CHANGE": change, "NORMALIZE": clip == "u8", "step_x": 1}
    constexprs |= pool_shape(2, 16, 16, 14)
    aligned = [*ALIGNED, "shift"]
    return dict(fn=pool_cells, num_warps=WARPS, aligned=aligned, signature=signature, constexprs=constexprs)
