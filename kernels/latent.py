"""Launchers of the latent losses, tensors in and tensors out. A call is (device function, p, window, reads h).

The kernels themselves and the legend are in ``_latent.py``.
"""

import torch
import triton
from vjepa_fast.kernels import _latent


def _pair_registers(calls: int) -> int:
    """Of a thread at most. given no bound, ptxas spills a few to fit one program more on an SM; 96 let 5 fit."""
    return 96 if calls <= 2 else 128 if calls <= 5 else 168


def _sizes(z, h, levels):
    d = z.shape[-1]
    e = d // levels
    block = triton.next_power_of_2(e)
    return d, e, {"LEVELS": levels, "BLOCK": block, "num_warps": min(8, max(1, block // 256))}


def _token_launch(z, h, idx, after, fn, p, target, places, levels, normalize):
    """What both passes of TOKEN share: tensors, numbers and compile-time arguments."""
    d, e, meta = _sizes(z, h, levels)
    inputs = z.contiguous(), h.contiguous(), idx.contiguous(), (idx if after is None else after).contiguous()
    meta.update(FN=fn, TARGET=target, NORM=normalize, HAS_AFTER=after is not None)
    return inputs, (p, z.shape[1], h.shape[1], places, d, e), meta


def token(*arguments):
    """Rows float32 [B,K], and with ``keep`` the slopes int8 [B,K,D] (else empty), of ``ops.latent_loss_token``."""
    *arguments, keep = arguments
    inputs, numbers, meta = _token_launch(*arguments)
    z = inputs[0]
    rows = torch.empty(z.shape[:2], dtype=torch.float32, device=z.device)
    sign = torch.empty(z.shape if keep else (0,), dtype=torch.int8, device=z.device)
    if rows.numel():
        _latent.token[(rows.numel(),)](*inputs, rows, sign, *numbers, KEEP=keep, BACKWARD=False, **meta)
    return rows, sign


def token_from_sign(grad, sign, dtype):
    """Dz [B,K,D] in ``dtype`` from grad [B,K] and the slopes that the forward kept."""
    dz = torch.empty(sign.shape, dtype=dtype, device=sign.device)
    m, d = grad.numel(), sign.shape[-1]
    if dz.numel():
        block = min(triton.next_power_of_2(d), 4096)
        _latent.token_sign[(m, triton.cdiv(d, block))](
            grad.contiguous(), sign, dz, d, BLOCK=block, num_warps=min(8, max(1, block // 512))
        )
    return dz


def token_gradient(grad, *arguments):
    """Dz [B,K,D] from grad [B,K], slopes computed again."""
    inputs, numbers, meta = _token_launch(*arguments)
    dz = torch.empty_like(inputs[0])
    if dz.numel():
        _latent.token[(grad.numel(),)](*inputs, grad.contiguous(), dz, *numbers, KEEP=False, BACKWARD=True, **meta)
    return dz


def _calls(calls, d):
    fns, ps, windows, reads_h = zip(*calls)
    low, high, period = zip(*windows)
    count = tuple(float((hi - lo) * (d // per)) for lo, hi, per in windows)
    # Triton's cache on disk knows functions in a tuple by name only; with their sources an edited one is compiled anew
    sources = tuple(getattr(fn, "cache_key", "") for fn in fns)
    part = all((lo, hi) != (0, per) for lo, hi, per in windows)
    shapes = {"LOW": low, "HIGH": high, "PERIOD": period, "COUNT": count, "PART": part}
    return {"FNS": fns, "SOURCES": sources, "P": ps, **shapes, "NEEDS_H": any(reads_h)}


def _pair_launch(z, h, calls, places, levels, normalize):
    """What both passes of PAIR share: numbers and compile-time arguments."""
    (b, k), (d, e, meta) = z.shape[:2], _sizes(z, h, levels)
    meta.update(NORM=normalize, maxnreg=_pair_registers(len(calls)), **_calls(calls, d))
    return (k, h.shape[1], b * k, places, d, e), meta


def pair(z, h, idx, after, calls, places, levels, normalize):
    """Rows float32 [R,B,K] of ``ops.latent_loss_pair``, one launch for all R calls."""
    z, h, idx, after = (x.contiguous() for x in (z, h, idx, after))
    numbers, meta = _pair_launch(z, h, calls, places, levels, normalize)
    rows = torch.empty((len(calls), *z.shape[:2]), dtype=torch.float32, device=z.device)
    if rows.numel():
        _latent.pair_forward[(idx.numel(),)](z, h, idx, after, rows, *numbers, **meta)
    return rows


def pair_gradient(grad, z, h, idx, after, before, calls, places, levels, normalize):
    """Dz [B,K,D] from grad [R,B,K]."""
    grad, z, h, idx, after, before = (x.contiguous() for x in (grad, z, h, idx, after, before))
    numbers, meta = _pair_launch(z, h, calls, places, levels, normalize)
    dz = torch.empty_like(z)
    if dz.numel():
        _latent.pair_backward[(idx.numel(),)](grad, z, h, idx, after, before, dz, *numbers, **meta)
    return dz


_COLUMN_REGISTERS = 192  # see _pair_registers


def _column_launch(z, h, slots, tokens, constants, fn, levels, normalize):
    """What both passes of COLUMN share: tensors, numbers and compile-time arguments."""
    (_, p, t), d, e = slots.shape, z.shape[2], z.shape[2] // levels
    steps = triton.next_power_of_2(t)
    block = max(16, min(triton.next_power_of_2(e), 1024 // steps))
    inputs = [x.contiguous() for x in (z, h, slots, tokens, constants.float())]
    # one warp holds all time steps of its channels: sums over time take shuffles, not shared memory and a barrier
    meta = {"BLOCK": block, "STEPS": steps, "num_warps": 1, "maxnreg": _COLUMN_REGISTERS}
    meta.update(FN=fn, LEVELS=levels, NORM=normalize)
    return inputs, (p, z.shape[1], h.shape[1], constants.shape[0], t, d, e), meta


def column(*arguments):
    """Rows float32 [B,P] of ``ops.latent_loss_column``."""
    inputs, numbers, meta = _column_launch(*arguments)
    rows = torch.empty(inputs[2].shape[:2], dtype=torch.float32, device=inputs[0].device)
    if rows.numel():
        _latent.column[(rows.numel(),)](*inputs, rows, rows, *numbers, BACKWARD=False, **meta)
    return rows


def column_gradient(grad, *arguments):
    """Dz [B,K,D] from grad [B,P]; 0 for rows of ``z`` that are in no column."""
    inputs, numbers, meta = _column_launch(*arguments)
    dz = torch.zeros_like(inputs[0])
    if grad.numel():
        _latent.column[(grad.numel(),)](*inputs, grad.contiguous(), dz, *numbers, BACKWARD=True, **meta)
    return dz


def variants(functions):
    """Builds that a training run needs: ViT-B (4 levels of 768), clips of 8 time steps; ``functions`` by key."""
    i64 = dict.fromkeys(("idx", "after", "before", "slots", "tokens"), "*i64")
    ints = dict.fromkeys(("K", "N", "M", "places", "D", "E", "P", "C", "T"), "i32")
    tensors = {"rows": "*fp32", "sign": "*i8", "grad": "*fp32", "constants": "*fp32", "p": "fp32"}

    def build(fn, dtype, constexprs, num_warps=4):
        bound = _COLUMN_REGISTERS if "STEPS" in constexprs else None
        bound = _pair_registers(len(constexprs["FNS"])) if "FNS" in constexprs else bound
        out = {"out": dtype if constexprs.get("BACKWARD") else "*i8"}
        known = {"z": dtype, "h": "*bf16", "dz": dtype, **out, **i64, **ints, **tensors}
        constexprs = {"LEVELS": 4, "NORM": True, "BLOCK": 1024, **constexprs}
        names = [n for n in fn.arg_names if n not in constexprs]
        constexprs = {n: v for n, v in constexprs.items() if n in fn.arg_names}
        aligned = [n for n in names if n in ("z", "h", "dz", "out", "sign", "rows", "grad", "D", "E")]
        signature = {n: known[n] for n in names}
        options = {"aligned": aligned, "num_warps": num_warps, "maxnreg": bound}
        return {"fn": fn, "signature": signature, "constexprs": constexprs, **options}

    def pairs(*calls):
        return _calls([(functions[key], 0.0, window, reads_h) for key, window, reads_h in calls], 3072)

    everything = (0, 3072, 3072)
    static = pairs(("step", (0, 1536, 3072), False))
    contrast = [(f"ltc_{n}", everything, n != "zz") for n in ("zz", "zh", "zh_later", "hh", "hh_later")]
    steps = [("step", (0, 384, 768), False), ("delta", everything, True)]
    ltc, mixed, all_terms = pairs(*contrast), pairs(*steps), pairs(*steps, *contrast, ("step", everything, False))
    same = {"FN": functions["l1"], "TARGET": 0, "HAS_AFTER": False, "KEEP": True, "BACKWARD": False}
    change = {**same, "TARGET": 2, "HAS_AFTER": True}
    power = {**same, "FN": functions["power"], "KEEP": False, "BACKWARD": True}
    wide = {"LEVELS": 4, "BLOCK": 2048}  # 1664 channels a level
    columns = {"FN": functions["spectrum"], "BLOCK": 128, "STEPS": 8}
    return {
        "token_forward_bf16": build(_latent.token, "*bf16", same),
        "token_forward_fp32": build(_latent.token, "*fp32", same),
        "token_forward_wide_bf16": build(_latent.token, "*bf16", {**same, **wide}, 8),
        "token_forward_step_bf16": build(_latent.token, "*bf16", change),
        "token_sign_bf16": build(_latent.token_sign, "*bf16", {"BLOCK": 4096}, 8),
        "token_backward_power_bf16": build(_latent.token, "*bf16", power),
        "pair_forward_static_bf16": build(_latent.pair_forward, "*bf16", static),
        "pair_forward_ltc_bf16": build(_latent.pair_forward, "*bf16", ltc),
        "pair_forward_all_bf16": build(_latent.pair_forward, "*bf16", all_terms),
        "pair_backward_static_bf16": build(_latent.pair_backward, "*bf16", static),
        "pair_backward_mixed_bf16": build(_latent.pair_backward, "*bf16", mixed),
        "pair_backward_all_bf16": build(_latent.pair_backward, "*bf16", all_terms),
        "pair_backward_wide_bf16": build(_latent.pair_backward, "*bf16", {**mixed, **wide}, 8),
        "column_forward_bf16": build(_latent.column, "*bf16", {**columns, "BACKWARD": False}, 1),
        "column_backward_bf16": build(_latent.column, "*bf16", {**columns, "BACKWARD": True}, 1),
    }
