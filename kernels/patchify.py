"""tubelet_patchify and patch_mean. A row of a tubelet (``patch`` pixels) is what lies together in memory."""

from __future__ import annotations

import triton
import triton.language as tl
from vjepa_fast.kernels._clips import ALIGNED, BLOCK, OPTIONS, STEPS, TABLES, WARPS, launch_pool, pool_variant


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


def tubelet_patchify(clip, idx, tubelet, patch, scale, shift, out) -> None:
    """Idx int64 [B,K], [1,K] of b*N + n, or None for all; scale, shift float32 [C], for uint8; out [B,K,P], float."""
    c, f, height, width = clip.shape[1:]
    h, w = height // patch, width // patch
    n = f // tubelet * h * w
    cols = triton.next_power_of_2(patch)
    rows = max(1, min(BLOCK // cols, triton.next_power_of_2(c * tubelet * patch)))
    if out.numel():
        kept = None if idx is None else idx.contiguous()
        numbers = out.shape[1], n, n * clip.shape[0] // out.shape[0], h, w
        meta = {"C": c, "TUBELET": tubelet, "PATCH": patch, "ROWS": rows, "COLS": cols, **OPTIONS}
        meta.update(HAS_IDX=idx is not None, NORMALIZE=not clip.is_floating_point())
        _patchify[(out.shape[0] * out.shape[1],)](clip, kept, scale, shift, out, *numbers, *clip.stride(), **meta)


def patch_mean(clip, scale, shift, out) -> None:
    """scale, shift float32 [C], for uint8; out float32 [B,T,H,W,C]."""
    launch_pool(clip, scale, shift, out, change=False)


def variants() -> dict[str, dict]:
    """The builds that benchmarks/aot.py compiles."""

    def patchify(clip, out, patch, aligned):
        cols = triton.next_power_of_2(patch)
        shape = {"C": 3, "TUBELET": 2, "PATCH": patch, "COLS": cols, "ROWS": BLOCK // cols, "step_x": 1}
        constexprs = {**shape, "HAS_IDX": True, "NORMALIZE": clip == "u8"}
        signature = {"clip": f"*{clip}", "idx": "*i64", **TABLES, "out": f"*{out}"}
        signature |= {**dict.fromkeys(("k", "n_tokens", "limit", "n_h", "n_w"), "i32"), **STEPS}
        return dict(fn=_patchify, num_warps=WARPS, aligned=aligned, signature=signature, constexprs=constexprs)

    return {
        "patchify_u8_bf16": patchify("u8", "bf16", 16, [*ALIGNED, "idx", "shift"]),
        "patchify_bf16_fp32_p14": patchify("bf16", "fp32", 14, ["clip", "idx", "scale", "shift", "out"]),
        "patch_mean_u8": pool_variant("u8", False),
    }
