"""Residual + LayerNorm of the target's tokens in a block, and the backward of both."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.ops._inputs import Case, E, Inputs, N, forced
from vjepa_fast.ops.add_norm import add_norm, add_norm_backward

EPS = 1e-6


def forward(x: Inputs) -> Case:
    rows, parts = _rows(x), [x.randn(E, seed=n).float() for n in (3, 4, 5)]
    stream, branch = (x.randn(rows, E, seed=n) for n in (1, 2))
    shift, weight, bias = parts

    def plain() -> list[Tensor]:
        total = stream + (branch + shift.to(x.dtype))
        return [total, F.layer_norm(total.float(), (E,), weight, bias, EPS).to(x.dtype)]

    def ours() -> list[Tensor]:
        out = torch.empty_like(stream)
        return [add_norm(stream, branch, shift, weight, bias, EPS, out)[0], out]

    return Case(
        "add_norm",
        f"{rows}x{E}",
        {"reference": plain, "eager": forced("eager", ours), "fused": ours},
        floor_bytes=4 * stream.numel() * x.size,
        compile_=plain,
        atol=1e-4 if x.size == 4 else 5e-2,
    )


def backward(x: Inputs) -> Case:
    rows = _rows(x)
    grad, total, rest = (x.randn(rows, E, seed=n) for n in (1, 2, 3))
    weight, bias = (x.randn(E, seed=n).float() for n in (4, 5))
    out, mean, rstd = torch.native_layer_norm(total.float(), (E,), weight, bias, EPS)

    def plain() -> list[Tensor]:
        wide = grad.float(), total.float(), (E,), mean, rstd, weight, bias, [True, True, True]
        dx, dw, db = torch.ops.aten.native_layer_norm_backward(*wide)
        dx = dx + rest
        return [dx.to(x.dtype), F.layer_norm(total.float(), (E,), weight, bias, EPS).to(x.dtype), dw, db, dx.sum(0)]

    def ours() -> list[Tensor]:
        dx, again, sums = add_norm_backward(grad, total, rest, weight, bias, mean.flatten(), rstd.flatten())
        return [dx, again, *sums]

    return Case(
        "add_norm_backward",
        f"{rows}x{E}",
        {"reference": plain, "eager": forced("eager", ours), "fused": ours},
        floor_bytes=5 * total.numel() * x.size,
        compile_=plain,
        atol=1e-4 if x.size == 4 else 5e-2,
    )


def _rows(x: Inputs) -> int:
    return x.batch * N


CASES = {"add_norm": forward, "add_norm_backward": backward}
