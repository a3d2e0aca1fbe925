"""``ops.mask_distance`` on the GPU: the nearest predicted token of each context token, by looking at every pair.

Legend: B batch, Ke context tokens, Kp predicted tokens, grid (T,H,W), token index n = (t*H+h)*W+w.

Why not the distance transform that the CPU uses: it needs N*(T+H+W) steps a sample instead of Ke*Kp, but they form
three passes with a barrier between them and only B programs. Pairs need about 7 integer operations each and no memory:
a batch of 64 with 419 x 814 tokens makes 22 M pairs, 150 M operations, and about as many again to take tokens apart;
on paper 20 us of an H200 (64 int32 operations per SM and clock), spread over B * Ke / 64 programs in one launch.
Indices outside the grid are never used as addresses.

Bytes: the floor is both masks once and the result once, 8 B (Ke + Kp) + 4 B Ke; every program of a sample reads the
sample's predicted tokens again, from the cache.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl


@triton.jit
def _position(idx, N, H, W):
    n = tl.minimum(tl.maximum(idx, 0), N - 1).to(tl.int32)
    t = n // (H * W)
    h = (n - t * H * W) // W
    return t, h, n - (t * H + h) * W  # two divisions, not four


@triton.jit(do_not_specialize=["Ke", "Kp", "T", "H", "W", "divisor"])  # lengths change from step to step
def _nearest(enc, pred, out, Ke, Kp, T, H, W, divisor, BLOCK: tl.constexpr, CHUNK: tl.constexpr):
    """Enc int64 [B,Ke], pred int64 [B,Kp] -> out float32 [B,Ke]; program (b, i) computes BLOCK context tokens."""
    b = tl.program_id(0).to(tl.int64)
    k = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    N = T * H * W
    t, h, w = _position(tl.load(enc + b * Ke + k, k < Ke, other=0), N, H, W)
    best = tl.full([BLOCK, CHUNK], 2147483647, tl.int32)
    for first in range(0, Kp, CHUNK):
        j = first + tl.arange(0, CHUNK)
        # past the end the last token again: it changes no minimum
        pt, ph, pw = _position(tl.load(pred + b * Kp + tl.minimum(j, Kp - 1)), N, H, W)
        dt, dh, dw = t[:, None] - pt[None, :], h[:, None] - ph[None, :], w[:, None] - pw[None, :]
        best = tl.minimum(best, dt * dt + dh * dh + dw * dw)
    # correctly rounded as eager's
    distance = tl.div_rn(tl.sqrt_rn(tl.min(best, 1).to(tl.float32)), divisor.to(tl.float32))
    tl.store(out + b * Ke + k, tl.sqrt_rn(distance), k < Ke)


def mask_distance(enc: torch.Tensor, pred: torch.Tensor, grid, divisor: int) -> torch.Tensor:
    """int64 [B,Ke], int64 [B,Kp], Kp > 0 -> float32 [B,Ke]."""
    out = torch.empty(enc.shape, dtype=torch.float32, device=enc.device)
    if out.numel():
        B, Ke = enc.shape
        _nearest[(B, triton.cdiv(Ke, 64))](
            enc.contiguous(), pred.contiguous(), out, Ke, pred.shape[1], *grid, divisor, BLOCK=64, CHUNK=64
        )
    return out


def variants() -> dict:
    """The builds that benchmarks/aot.py compiles."""
    sizes = dict.fromkeys(("Ke", "Kp", "T", "H", "W", "divisor"), "i32")
    tile = dict(BLOCK=64, CHUNK=64)
    signature = dict(enc="*i64", pred="*i64", out="*fp32", **sizes)
    return {"nearest": dict(fn=_nearest, signature=signature, constexprs=tile, aligned=["enc", "pred", "out"])}
