"""Launchers of the latent losses, tensors in and tensors out. A call is (device function, p, window, reads h).

The kernels themselves and the legend are in ``_latent.py``.
"""

import torch
import triton
from vjepa_fast.kernels._latent import (
    column_backward,
    column_forward,
    pair_backward,
    pair_forward,
    token_backward,
    token_forward,
    token_sign,
)


def _pair_registers(calls: int) -> int:
    """Of a thread at most. given no bound, ptxas spills a few to fit one program more on an SM; 96 let 5 fit."""
    return 96 if calls <= 2 else 128 if calls <= 5 else 168


def _sizes(z, h, levels):
    d = z.shape[-1]
    e = d // levels
    block = triton.next_power_of_2(e)
    return d, e, {"LEVELS": levels, "BLOCK": block, "num_warps": min(8, max(1, block // 256))}


def token(z, h, idx, after, fn, p, target, places, levels, normalize, keep):
    """Rows float32 [B,K], and with ``keep`` the slopes int8 [B,K,D] (else empty), of ``ops.latent_loss_token``."""
    (b, k), n = z.shape[:2], h.shape[1]
    z, h, idx = z.contiguous(), h.contiguous(), idx.contiguous()
    d, e, meta = _sizes(z, h, levels)
    rows = torch.empty((b, k), dtype=torch.float32, device=z.device)
    sign = torch.empty(z.shape if keep else (0,), dtype=torch.int8, device=z.device)
    if rows.numel():
        token_forward[(b * k,)](
            z,
            h,
            idx,
            idx if after is None else after.contiguous(),
            rows,
            sign,
            p,
            k,
            n,
            places,
            d,
            e,
            FN=fn,
            TARGET=target,
            NORM=normalize,
            HAS_AFTER=after is not None,
            KEEP=keep,
            **meta,
        )
    return rows, sign


def token_from_sign(grad, sign, dtype):
    """Dz [B,K,D] in ``dtype`` from grad [B,K] and the slopes that the forward kept."""
    dz = torch.empty(sign.shape, dtype=dtype, device=sign.device)
    m, d = grad.numel(), sign.shape[-1]
    if dz.numel():
        block = min(triton.next_power_of_2(d), 4096)
        token_sign[(m, triton.cdiv(d, block))](
            grad.contiguous(), sign, dz, d, BLOCK=block, num_warps=min(8, max(1, block // 512))
        )
    return dz


def token_gradient(grad, z, h, idx, after, fn, p, target, places, levels, normalize):
    """Dz [B,K,D] from grad [B,K], slopes computed again."""
    (b, k), n = z.shape[:2], h.shape[1]
    z, h, idx = z.contiguous(), h.contiguous(), idx.contiguous()
    d, e, meta = _sizes(z, h, levels)
    dz = torch.empty_like(z)
    if dz.numel():
        token_backward[(b * k,)](
            grad.contiguous(),
            z,
            h,
            idx,
            idx if after is None else after.contiguous(),
            dz,
            p,
            k,
            n,
            places,
            d,
            e,
            FN=fn,
            TARGET=target,
            NORM=normalize,
            HAS_AFTER=after is not None,
            **meta,
        )
    return dz


def _calls(calls, d):
    fns, ps, windows, reads_h = zip(*calls)
    low, high, period = zip(*windows)
    count = tuple(float((hi - lo) * (d // per)) for lo, hi, per in windows)
    # Triton's cache on disk knows functions in a tuple by name only; with their sources an edited one is compiled anew
    sources = tuple(getattr(fn, "cache_key", "") for fn in fns)
    part = all((lo, hi) != (0, per) for lo, hi, per in windows)
    return {
        "FNS": fns,
        "SOURCES": sources,
        "P": ps,
        "LOW": low,
        "HIGH": high,
        "PERIOD": period,
        "COUNT": count,
        "PART": part,
        "NEEDS_H": any(reads_h),
    }


def pair(z, h, idx, after, calls, places, levels, normalize):
    """Rows float32 [R,B,K] of ``ops.latent_loss_pair``, one launch for all R calls."""
    (b, k), n = z.shape[:2], h.shape[1]
    z, h, idx, after = (x.contiguous() for x in (z, h, idx, after))
    d, e, meta = _sizes(z, h, levels)
    rows = torch.empty((len(calls), b, k), dtype=torch.float32, device=z.device)
    if rows.numel():
        pair_forward[(b * k,)](
            z,
            h,
            idx,
            after,
            rows,
            k,
            n,
            b * k,
            places,
            d,
            e,
            NORM=normalize,
            maxnreg=_pair_registers(len(calls)),
            **_calls(calls, d),
            **meta,
        )
    return rows


def pair_gradient(grad, z, h, idx, after, before, calls, places, levels, normalize):
    """Dz [B,K,D] from grad [R,B,K]."""
    (b, k), n = z.shape[:2], h.shape[1]
    grad, z, h, idx, after, before = (x.contiguous() for x in (grad, z, h, idx, after, before))
    d, e, meta = _sizes(z, h, levels)
    dz = torch.empty_like(z)
    if dz.numel():
        pair_backward[(b * k,)](
            grad,
            z,
            h,
            idx,
            after,
            before,
            dz,
            k,
            n,
            b * k,
            places,
            d,
            e,
            NORM=normalize,
            maxnreg=_pair_registers(len(calls)),
            **_calls(calls, d),
            **meta,
        )
    return dz


_COLUMN_REGISTERS = 192  # see _pair_registers


def _column_sizes(slots, e):
    steps = triton.next_power_of_2(slots.shape[2])
    block = max(16, min(triton.next_power_of_2(e), 1024 // steps))
    # one warp holds all time steps of its channels: sums over time take shuffles, not shared memory and a barrier
    return {"BLOCK": block, "STEPS": steps, "num_warps": 1, "maxnreg": _COLUMN_REGISTERS}


def column(z, h, slots, tokens, constants, fn, levels, normalize):
    """Rows float32 [B,P] of ``ops.latent_loss_column``."""
    b, p, t = slots.shape
    z, h, slots, tokens, constants = (x.contiguous() for x in (z, h, slots, tokens, constants.float()))
    d = z.shape[-1]
    rows = torch.empty((b, p), dtype=torch.float32, device=z.device)
    if rows.numel():
        column_forward[(b * p,)](
            z,
            h,
            slots,
            tokens,
            constants,
            rows,
            p,
            z.shape[1],
            h.shape[1],
            constants.shape[0],
            t,
            d,
            d // levels,
            FN=fn,
            LEVELS=levels,
            NORM=normalize,
            **_column_sizes(slots, d // levels),
        )
    return rows


def column_gradient(grad, z, h, slots, tokens, constants, fn, levels, normalize):
    """Dz [B,K,D] from grad [B,P]; 0 for rows of ``z`` that are in no column."""
    b, p, t = slots.shape
    grad, z, h, slots, tokens, constants = (x.contiguous() for x in (grad, z, h, slots, tokens, constants.float()))
    d = z.shape[-1]
    dz = torch.zeros_like(z)
    if grad.numel():
        column_backward[(b * p,)](
            grad,
            z,
            h,
            slots,
            tokens,
            constants,
            dz,
            p,
            z.shape[1],
            h.shape[1],
            constants.shape[0],
            t,
            d,
            d // levels,
            FN=fn,
            LEVELS=levels,
            NORM=normalize,
            **_column_sizes(slots, d // levels),
        )
    return dz


def variants(functions):
    """Builds that a training run needs: ViT-B (4 levels of 768), clips of 8 time steps; ``functions`` by key."""
    i64 = dict.fromkeys(("idx", "after", "before", "slots", "tokens"), "*i64")
    ints = dict.fromkeys(("K", "N", "M", "places", "D", "E", "P", "C", "T"), "i32")
    tensors = {"rows": "*fp32", "sign": "*i8", "grad": "*fp32", "constants": "*fp32", "p": "fp32"}

    def build(fn, dtype, constexprs, num_warps=4):
        bound = _COLUMN_REGISTERS if "STEPS" in constexprs else None
        bound = _pair_registers(len(constexprs["FNS"])) if "FNS" in constexprs else bound
        known = {"z": dtype, "h": "*bf16", "dz": dtype, **i64, **ints, **tensors}
        constexprs = {"LEVELS": 4, "NORM": True, "BLOCK": 1024, **constexprs}
        names = [n for n in fn.arg_names if n not in constexprs]
        constexprs = {n: v for n, v in constexprs.items() if n in fn.arg_names}
        aligned = [n for n in names if n in ("z", "h", "dz", "sign", "rows", "grad", "D", "E")]
        return {
            "fn": fn,
            "signature": {n: known[n] for n in names},
            "constexprs": constexprs,
            "aligned": aligned,
            "num_warps": num_warps,
            "maxnreg": bound,
        }

    def pairs(*calls):
        return _calls([(functions[key], 0.0, window, reads_h) for key, window, reads_h in calls], 3072)

    everything = (0, 3072, 3072)
    static = pairs(("step", (0, 1536, 3072), False))
    contrast = [(f"ltc_{n}", everything, n != "zz") for n in ("zz", "zh", "zh_later", "hh", "hh_later")]
    steps = [("step", (0, 384, 768), False), ("delta", everything, True)]
    ltc, mixed, all_terms = pairs(*contrast), pairs(*steps), pairs(*steps, *contrast, ("step", everything, False))
    same = {"FN": functions["l1"], "TARGET": 0, "HAS_AFTER": False, "KEEP": True}
    change = {"FN": functions["l1"], "TARGET": 2, "HAS_AFTER": True, "KEEP": True}
    power = {"FN": functions["power"], "TARGET": 0, "HAS_AFTER": False}
    wide = {"LEVELS": 4, "BLOCK": 2048}  # 1664 channels a level
    column = {"FN": functions["spectrum"], "BLOCK": 128, "STEPS": 8}
    return {
        "token_forward_bf16": build(token_forward, "*bf16", same),
        "token_forward_fp32": build(token_forward, "*fp32", same),
        "token_forward_wide_bf16": build(token_forward, "*bf16", {**same, **wide}, 8),
        "token_forward_step_bf16": build(token_forward, "*bf16", change),
        "token_sign_bf16": build(token_sign, "*bf16", {"BLOCK": 4096}, 8),
        "token_backward_power_bf16": build(token_backward, "*bf16", power),
        "pair_forward_static_bf16": build(pair_forward, "*bf16", static),
        "pair_forward_ltc_bf16": build(pair_forward, "*bf16", ltc),
        "pair_forward_all_bf16": build(pair_forward, "*bf16", all_terms),
        "pair_backward_static_bf16": build(pair_backward, "*bf16", static),
        "pair_backward_mixed_bf16": build(pair_backward, "*bf16", mixed),
        "pair_backward_all_bf16": build(pair_backward, "*bf16", all_terms),
        "pair_backward_wide_bf16": build(pair_backward, "*bf16", {**mixed, **wide}, 8),
        "column_forward_bf16": build(column_forward, "*bf16", column, 1),
        "column_backward_bf16": build(column_backward, "*bf16", column, 1),
    }
