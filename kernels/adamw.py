"""AdamW and the moving average behind it on the GPU: all tensors of a group in one launch, each number read once."""

from __future__ import annotations

from collections.abc import Callable

import torch
import triton
import triton.language as tl

BLOCK, WARPS = 1024, 8
_KEPT = 32  # tables: gradients often, not always, come back to the addresses of an earlier step
_tables: dict[tuple, torch.Tensor] = {}


@triton.jit
def _chunk(
    pointers,  # to parameter, gradient, both averages, target, its copy
    at,
    inside,
    has_target,
    has_low,
    numbers,  # scale, keep, gain1, beta2, gain2, pace, root, eps, follow
    MASKED: tl.constexpr,  # some elements of the block lie beyond the end
):
    p_ptr, g_ptr, m_ptr, v_ptr, target_ptr, low_ptr = pointers
    scale, keep, gain1, beta2, gain2, pace, root, eps, follow = numbers
    mask = inside if MASKED else None
    other = 0.0 if MASKED else None
    g = tl.load(g_ptr + at, mask=mask, other=other) * scale
    m = tl.load(m_ptr + at, mask=mask, other=other)
    v = tl.load(v_ptr + at, mask=mask, other=other)
    p = tl.load(p_ptr + at, mask=mask, other=other)
    m = m + gain1 * (g - m)
    v = beta2 * v + gain2 * g * g
    p = p * keep - tl.div_rn(pace * m, tl.sqrt_rn(v) * root + eps)  # exact ones: hidden behind memory
    tl.store(m_ptr + at, m, mask=mask)
    tl.store(v_ptr + at, v, mask=mask)
    tl.store(p_ptr + at, p, mask=mask)
    if has_target:
        t = tl.load(target_ptr + at, mask=mask, other=other)
        near = p - t  # exact at both ends: where they are equal, and where follow is 1
        t = tl.where(follow < 0.5, t + follow * near, p - (1.0 - follow) * near)
        tl.store(target_ptr + at, t, mask=mask)
        if has_low:
            tl.store(low_ptr + at, t.to(tl.bfloat16), mask=mask)


@triton.jit
def _step(
    rows_ptr,  # int64 [tensors, 7]: addresses of parameter, gradient, both averages, target, its copy; elements
    chunks_ptr,  # int32 [programs, 2]: tensor, and which BLOCK of it
    scale_ptr,  # float32 [], not read unless SCALED; below 0: nothing is to change
    numbers_ptr,  # float64 [4]: keep, pace, root, follow; they change from step to step, a captured launch does not
    gain1,
    beta2,
    gain2,
    eps,
    SCALED: tl.constexpr,
    ALIGNED: tl.constexpr,  # all addresses are multiples of 16
    BLOCK: tl.constexpr,
):
    """Floor, and what it moves: each number read once, all but the gradient written once."""
    row = rows_ptr + tl.load(chunks_ptr + 2 * tl.program_id(0)).to(tl.int64) * 7
    first = tl.load(chunks_ptr + 2 * tl.program_id(0) + 1).to(tl.int64) * BLOCK
    p_ptr = tl.load(row).to(tl.pointer_type(tl.float32))
    g_ptr = tl.load(row + 1).to(tl.pointer_type(tl.float32))
    m_ptr = tl.load(row + 2).to(tl.pointer_type(tl.float32))
    v_ptr = tl.load(row + 3).to(tl.pointer_type(tl.float32))
    target, low, n = tl.load(row + 4), tl.load(row + 5), tl.load(row + 6)
    target_ptr, low_ptr = target.to(tl.pointer_type(tl.float32)), low.to(tl.pointer_type(tl.bfloat16))
    if ALIGNED:
        p_ptr, g_ptr = tl.multiple_of(p_ptr, 16), tl.multiple_of(g_ptr, 16)
        m_ptr, v_ptr = tl.multiple_of(m_ptr, 16), tl.multiple_of(v_ptr, 16)
        target_ptr, low_ptr = tl.multiple_of(target_ptr, 16), tl.multiple_of(low_ptr, 16)
    scale = 1.0
    if SCALED:
        scale = tl.load(scale_ptr)
        n = tl.where(scale < 0, 0, n)
    at = first + tl.arange(0, BLOCK)
    inside = at < n
    keep, pace = tl.load(numbers_ptr).to(tl.float32), tl.load(numbers_ptr + 1).to(tl.float32)
    root, follow = tl.load(numbers_ptr + 2).to(tl.float32), tl.load(numbers_ptr + 3).to(tl.float32)
    pointers = (p_ptr, g_ptr, m_ptr, v_ptr, target_ptr, low_ptr)
    numbers = (scale, keep, gain1, beta2, gain2, pace, root, eps, follow)
    if first + BLOCK <= n:  # without a mask, whose edge may lie anywhere, loads are of 16 bytes
        _chunk(pointers, at, inside, target != 0, low != 0, numbers, False)
    else:
        _chunk(pointers, at, inside, target != 0, low != 0, numbers, True)


def _kept(make, values: tuple, device: torch.device, put, keep: bool) -> torch.Tensor:
    """``make(values)`` on the device, or what was made of the same values at an earlier step."""
    key = (device, make, values)
    if not keep:
        return put(make(values), device)
    if key not in _tables:
        if len(_tables) >= _KEPT:
            _tables.pop(next(iter(_tables)))
        _tables[key] = put(make(values), device)
    return _tables[key]


def _rows(addresses: tuple) -> torch.Tensor:
    return torch.tensor(addresses, dtype=torch.int64)


def _chunks(sizes: tuple) -> torch.Tensor:
    blocks = (torch.tensor(sizes) + BLOCK - 1) // BLOCK
    tensor = torch.repeat_interleave(torch.arange(len(sizes)), blocks)
    number = torch.arange(len(tensor)) - (blocks.cumsum(0) - blocks)[tensor]
    return torch.stack([tensor, number], 1).to(torch.int32)


def adamw_ema(
    addresses: list[tuple[int, ...]],
    rule,
    scale: torch.Tensor | None,
    numbers: torch.Tensor,
    device: torch.device,
    put: Callable[[torch.Tensor, torch.device], torch.Tensor],
    keep: bool,
) -> None:
    """One step over the tensors at these addresses (see ``_step``; 0 for no target, no copy).

    ``put`` brings a table to the device; ``keep``: it may serve a later step too, as one of a capture may not.
    """
    addresses = [a for a in addresses if a[6]]
    if not addresses:
        return
    rows = _kept(_rows, tuple(addresses), device, put, keep)
    chunks = _kept(_chunks, tuple(a[6] for a in addresses), device, put, keep)
    aligned = not any(pointer % 16 for a in addresses for pointer in a[:6])
    betas = 1.0 - rule.beta1, float(rule.beta2), 1.0 - rule.beta2
    meta = dict(SCALED=scale is not None, ALIGNED=aligned, BLOCK=BLOCK, num_warps=WARPS)
    _step[(len(chunks),)](rows, chunks, rows if scale is None else scale, numbers, *betas, float(rule.eps), **meta)


def variants() -> dict[str, dict]:
    """The builds that benchmarks/aot.py compiles."""

    def one(scaled: bool, aligned: bool) -> dict:
        pointers = {"rows_ptr": "*i64", "chunks_ptr": "*i32", "scale_ptr": "*fp32" if scaled else "*i64"}
        pointers["numbers_ptr"] = "*fp64"
        numbers = dict.fromkeys(("gain1", "beta2", "gain2", "eps"), "fp32")
        constexprs = dict(SCALED=scaled, ALIGNED=aligned, BLOCK=BLOCK)
        signature = pointers | numbers
        return dict(fn=_step, constexprs=constexprs, num_warps=WARPS, aligned=[*pointers], signature=signature)

    return {"step": one(False, True), "step_clipped": one(True, True), "step_unaligned": one(False, False)}
