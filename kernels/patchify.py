"""What reads pixels: tubelet_patchify, patch_mean, motion_saliency.

Clips [B,C,F,Y,X] of any strides, cut into a grid (T,H,W). A row of a tubelet (``patch`` pixels) is what lies together
in memory, so a block's last axis runs along it and a thread takes up to 16 bytes.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["k"])  # it changes from step to step
def _patchify(
    clip,
    idx,
    scale,
    shift,
    out,
    k,
    n_tokens,
    limit,
    n_h,
    n_w,
    step_b,
    step_c,
    step_f,
    step_y,
    step_x,
    C: tl.constexpr,
    TUBELET: tl.constexpr,
    PATCH: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    HAS_IDX: tl.constexpr,
    NORMALIZE: tl.constexpr,
):
    """Clip -> out [B,K,P], one program per row of out, ROWS x COLS pixels at a time.

    Floor: B*K*P pixels read, as many numbers written, 8 bytes of each index. It moves that, and up to twice the reads
    where 16 bytes of a line are kept alone, as memory gives 32 at least. A token outside [0, limit) reads nothing and
    gives NaN. limit is N, or B*N where one row of indices (k = all of them) holds b*N + n.
    """
    row = tl.program_id(0)
    b = (row // k).to(tl.int64)
    n = row % k
    n_rows = C * TUBELET * PATCH
    if HAS_IDX:
        n_wide = tl.load(idx + row)
        inside = (n_wide >= 0) & (n_wide < limit)
        n = tl.where(inside, n_wide, 0).to(tl.int32)
        b += n // n_tokens  # 0 but for an index of b*N + n
        n = n % n_tokens
        readable = tl.where(inside, n_rows, 0)
    else:
        readable = n_rows
    t, h, w = n // (n_h * n_w), n // n_w % n_h, n % n_w
    corner = b * step_b + (t * TUBELET).to(tl.int64) * step_f
    corner += (h * PATCH).to(tl.int64) * step_y + (w * PATCH).to(tl.int64) * step_x
    x = tl.arange(0, COLS)
    for start in range(0, C * TUBELET * PATCH, ROWS):
        r = start + tl.arange(0, ROWS)
        c, f, y = r // (TUBELET * PATCH), r // PATCH % TUBELET, r % PATCH
        at = corner + c.to(tl.int64) * step_c + f.to(tl.int64) * step_f + y.to(tl.int64) * step_y
        column = x.to(tl.int64) * step_x
        mine = (r < readable)[:, None] & (x < PATCH)[None, :]
        v = tl.load(clip + at[:, None] + column[None, :], mask=mine, other=0).to(tl.float32)
        if NORMALIZE:
            a = tl.load(scale + c, mask=c < C, other=0.0)
            m = tl.load(shift + c, mask=c < C, other=0.0)
            v = v * a[:, None] - m[:, None]
        if HAS_IDX:
            v = tl.where(mine, v, float("nan"))
        to = out + row.to(tl.int64) * (n_rows * PATCH) + r[:, None] * PATCH + x[None, :]
        tl.store(to, v.to(out.dtype.element_ty), mask=(r < n_rows)[:, None] & (x < PATCH)[None, :])


@triton.jit
def _pool(
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


@triton.jit
def _taps(i, scale, size):
    """The positions that output position i lies between (half-pixel centres), and the weight of the second."""
    source = tl.maximum((i.to(tl.float32) + 0.5) * scale - 0.5, 0.0)
    low = tl.minimum(source.to(tl.int32), size - 1)
    return low, tl.minimum(low + 1, size - 1), source - low.to(tl.float32)


@triton.jit
def _trilinear(
    clip,
    scale,
    out,
    n_t,
    n_h,
    n_w,
    n_f,
    n_y,
    n_x,
    t_scale,
    h_scale,
    w_scale,
    step_b,
    step_c,
    step_f,
    step_y,
    step_x,
    C: tl.constexpr,
    TOKENS: tl.constexpr,
):
    """Change of the clip sampled between pixels: clip -> out [B,T,H,W], TOKENS samples per program.

    Floor: 2*2*2 pixels of two frames and C channels per sample. Memory gives 32 bytes for each pair of neighbours, 16
    times the floor of a uint8 clip; with patches of 16 that is an eighth of the clip.
    """
    b = tl.program_id(0).to(tl.int64)
    n = tl.program_id(1) * TOKENS + tl.arange(0, TOKENS)
    mine = n < n_t * n_h * n_w
    t0, t1, t_part = _taps(n // (n_h * n_w), t_scale, n_f)
    y0, y1, y_part = _taps(n // n_w % n_h, h_scale, n_y)
    x0, x1, x_part = _taps(n % n_w, w_scale, n_x)
    total = tl.zeros([TOKENS], tl.float32)
    for corner in tl.static_range(8):
        f = tl.maximum(t0 if corner < 4 else t1, 1)
        y = y0 if corner % 4 < 2 else y1
        x = x0 if corner % 2 == 0 else x1
        weight = 1.0 - t_part if corner < 4 else t_part
        weight *= 1.0 - y_part if corner % 4 < 2 else y_part
        weight *= 1.0 - x_part if corner % 2 == 0 else x_part
        at = b * step_b + f.to(tl.int64) * step_f + y.to(tl.int64) * step_y + x.to(tl.int64) * step_x
        for c in range(C):
            pixel = clip + at + tl.full([], c, tl.int64) * step_c
            now = tl.load(pixel, mask=mine, other=0).to(tl.float32)
            before = tl.load(pixel - step_f, mask=mine, other=0).to(tl.float32)
            total += tl.abs(now - before) * weight * tl.load(scale + c)
    tl.store(out + b * (n_t * n_h * n_w) + n, total, mask=mine)


@triton.jit
def _divide_by_peak(raw, out, n_t, n_hw, floor, ACROSS: tl.constexpr, BLOCK: tl.constexpr):
    """Out = raw / max(peak, floor), both [B,T,H*W]; program j finds the peak of sample j and divides that sample by it,
    or, ACROSS, time slice j of all samples (B = T).

    Floor: raw read once, out written once; it reads raw twice, from the cache.
    """
    j = tl.program_id(0).to(tl.int64)
    n = n_t * n_hw
    peaks = tl.full([BLOCK], floor, tl.float32)
    for start in range(0, n, BLOCK):
        i = start + tl.arange(0, BLOCK)
        peaks = tl.maximum(peaks, tl.load(raw + j * n + i, mask=i < n, other=0.0))
    peak = tl.max(peaks, 0)
    for start in range(0, n, BLOCK):
        i = start + tl.arange(0, BLOCK)
        if ACROSS:
            at = (i // n_hw).to(tl.int64) * n + j * n_hw + i % n_hw
        else:
            at = j * n + i
        tl.store(out + at, tl.load(raw + at, mask=i < n, other=0.0) / peak, mask=i < n)


_BLOCK = 2048  # pixels of a program at a time: 16 per thread, 16 bytes of a uint8 clip
_WARPS = 4


def tubelet_patchify(clip, idx, tubelet, patch, scale, shift, out) -> None:
    """Idx int64 [B,K], [1,K] of b*N + n, or None for all; scale, shift float32 [C], for uint8; out [B,K,P], float."""
    c, f, height, width = clip.shape[1:]
    h, w = height // patch, width // patch
    n = f // tubelet * h * w
    cols = triton.next_power_of_2(patch)
    rows = max(1, min(_BLOCK // cols, triton.next_power_of_2(c * tubelet * patch)))
    if out.numel():
        _patchify[(out.shape[0] * out.shape[1],)](
            clip,
            idx if idx is None else idx.contiguous(),
            scale,
            shift,
            out,
            out.shape[1],
            n,
            n * clip.shape[0] // out.shape[0],
            h,
            w,
            *clip.stride(),
            C=c,
            TUBELET=tubelet,
            PATCH=patch,
            ROWS=rows,
            COLS=cols,
            HAS_IDX=idx is not None,
            NORMALIZE=not clip.is_floating_point(),
            num_warps=_WARPS,
            enable_fp_fusion=False,
        )


def _cell(size: int, cells: int) -> int:
    """The longest of ``cells`` parts of an axis of ``size``; they overlap where it cannot be divided."""
    return max(-(-(i + 1) * size // cells) - i * size // cells for i in range(cells))


def _pool_shape(cell_t: int, cell_y: int, cell_x: int, n_w: int) -> dict[str, int]:
    cols = triton.next_power_of_2(cell_x)
    rows = max(1, min(2 * _BLOCK // cols, triton.next_power_of_2(cell_t * cell_y)))
    tokens = max(1, min(2 * _BLOCK // (cols * rows), triton.next_power_of_2(n_w)))
    return {"CELL_T": cell_t, "CELL_Y": cell_y, "CELL_X": cell_x, "ROWS": rows, "TOKENS": tokens, "COLS": cols}


def _pooled(clip, scale, shift, out, change: bool) -> None:
    grid, size = out.shape[1:4], clip.shape[2:]
    shape = _pool_shape(*map(_cell, size, grid), grid[2])
    if out.numel():
        _pool[(out.shape[0] * grid[0] * grid[1], triton.cdiv(grid[2], shape["TOKENS"]))](
            clip,
            scale,
            shift,
            out,
            *grid,
            *size,
            *clip.stride(),
            C=clip.shape[1],
            EVEN=size[2] % grid[2] == 0,
            CHANGE=change,
            NORMALIZE=not clip.is_floating_point(),
            **shape,
            num_warps=_WARPS,
            enable_fp_fusion=False,
        )


def patch_mean(clip, scale, shift, out) -> None:
    """scale, shift float32 [C], for uint8; out float32 [B,T,H,W,C]."""
    _pooled(clip, scale, shift, out, change=False)


def area_change(clip, weight, out) -> None:
    """Weight float32 [C]; out float32 [B,T,H,W]."""
    _pooled(clip, weight, weight, out, change=True)


def trilinear_change(clip, weight, out) -> None:
    """Weight float32 [C]; out float32 [B,T,H,W]."""
    grid, size, tokens = out.shape[1:], clip.shape[2:], 128
    if out.numel():
        _trilinear[(out.shape[0], triton.cdiv(grid[0] * grid[1] * grid[2], tokens))](
            clip,
            weight,
            out,
            *grid,
            *size,
            *(s / g for s, g in zip(size, grid)),
            *clip.stride(),
            C=clip.shape[1],
            TOKENS=tokens,
            num_warps=_WARPS,
            enable_fp_fusion=False,  # positions are rounded as in eager code
        )


def divide_by_peak(raw, out, published: bool, floor: float) -> None:
    """raw, out float32 [B,T,H,W]; published: time slice t is divided by the peak of sample t (B in {1, T})."""
    b, t, h, w = raw.shape
    if out.numel():
        _divide_by_peak[(b,)](raw, out, t, h * w, floor, ACROSS=published and b > 1, BLOCK=1024, num_warps=_WARPS)


def variants() -> dict[str, dict]:
    steps = {f"step_{axis}": "i64" if axis == "b" else "i32" for axis in "bcfy"}
    grid = dict.fromkeys(("n_t", "n_h", "n_w", "n_f", "n_y", "n_x"), "i32")
    tables = {"scale": "*fp32", "shift": "*fp32"}
    pointers = ["clip", "scale", "out", *steps]

    def patchify(clip, out, patch, aligned):
        cols = triton.next_power_of_2(patch)
        shape = {"C": 3, "TUBELET": 2, "PATCH": patch, "COLS": cols, "ROWS": _BLOCK // cols, "step_x": 1}
        return {
            "fn": _patchify,
            "num_warps": _WARPS,
            "aligned": aligned,
            "signature": {
                "clip": f"*{clip}",
                "idx": "*i64",
                **tables,
                "out": f"*{out}",
                **dict.fromkeys(("k", "n_tokens", "limit", "n_h", "n_w"), "i32"),
                **steps,
            },
            "constexprs": {**shape, "HAS_IDX": True, "NORMALIZE": clip == "u8"},
        }

    def pool(clip, change):
        return {
            "fn": _pool,
            "num_warps": _WARPS,
            "aligned": [*pointers, "shift"],
            "signature": {"clip": f"*{clip}", **tables, "out": "*fp32", **grid, **steps},
            "constexprs": {
                "C": 3,
                "EVEN": True,
                "CHANGE": change,
                "NORMALIZE": clip == "u8",
                "step_x": 1,
                **_pool_shape(2, 16, 16, 14),
            },
        }

    return {
        "patchify_u8_bf16": patchify("u8", "bf16", 16, [*pointers, "idx", "shift"]),
        "patchify_bf16_fp32_p14": patchify("bf16", "fp32", 14, ["clip", "idx", "scale", "shift", "out"]),
        "patch_mean_u8": pool("u8", False),
        "area_u8": pool("u8", True),
        "trilinear_u8": {
            "fn": _trilinear,
            "num_warps": _WARPS,
            "aligned": pointers,
            "constexprs": {"C": 3, "TOKENS": 128, "step_x": 1},
            "signature": {
                "clip": "*u8",
                "scale": "*fp32",
                "out": "*fp32",
                **grid,
                **dict.fromkeys(("t_scale", "h_scale", "w_scale"), "fp32"),
                **steps,
            },
        },
        "divide_by_peak": {
            "fn": _divide_by_peak,
            "num_warps": _WARPS,
            "aligned": ["raw", "out"],
            "signature": {"raw": "*fp32", "out": "*fp32", "n_t": "i32", "n_hw": "i32", "floor": "fp32"},
            "constexprs": {"ACROSS": False, "BLOCK": 1024},
        },
    }
