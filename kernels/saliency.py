"""motion_saliency: change sampled between pixels or averaged over cells, then divided by its peak."""

from __future__ import annotations

import triton
import triton.language as tl
from vjepa_fast.kernels._clips import ALIGNED, GRID, OPTIONS, STEPS, WARPS, launch_pool, pool_variant


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


def area_change(clip, weight, out) -> None:
    """Weight float32 [C]; out float32 [B,T,H,W]."""
    launch_pool(clip, weight, weight, out, change=True)


def trilinear_change(clip, weight, out) -> None:
    """Weight float32 [C]; out float32 [B,T,H,W]."""
    grid, size, tokens = out.shape[1:], clip.shape[2:], 128
    if out.numel():
        scales = (s / g for s, g in zip(size, grid))
        meta = {"C": clip.shape[1], "TOKENS": tokens, **OPTIONS}
        blocks = triton.cdiv(grid[0] * grid[1] * grid[2], tokens)
        _trilinear[(out.shape[0], blocks)](clip, weight, out, *grid, *size, *scales, *clip.stride(), **meta)


def divide_by_peak(raw, out, published: bool, floor: float) -> None:
    """raw, out float32 [B,T,H,W]; published: time slice t is divided by the peak of sample t (B in {1, T})."""
    b, t, h, w = raw.shape
    if out.numel():
        _divide_by_peak[(b,)](raw, out, t, h * w, floor, ACROSS=published and b > 1, BLOCK=1024, num_warps=WARPS)


def variants() -> dict[str, dict]:
    """The builds that benchmarks/aot.py compiles."""
    signature = {"clip": "*u8", "scale": "*fp32", "out": "*fp32", **GRID}
    signature |= {**dict.fromkeys(("t_scale", "h_scale", "w_scale"), "fp32"), **STEPS}
    constexprs = {"C": 3, "TOKENS": 128, "step_x": 1}
    trilinear = dict(fn=_trilinear, aligned=ALIGNED, signature=signature, constexprs=constexprs)
    signature = {"raw": "*fp32", "out": "*fp32", "n_t": "i32", "n_hw": "i32", "floor": "fp32"}
    constexprs = {"ACROSS": False, "BLOCK": 1024}
    divide = dict(fn=_divide_by_peak, aligned=["raw", "out"], signature=signature, constexprs=constexprs)
    return {
        "area_u8": pool_variant("u8", True),
        "trilinear_u8": {**trilinear, "num_warps": WARPS},
        "divide_by_peak": {**divide, "num_warps": WARPS},
    }
