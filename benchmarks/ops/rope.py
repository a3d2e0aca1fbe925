"""rope3d of queries and keys."""

from __future__ import annotations

import torch

from benchmarks.ops._inputs import GRID, HEADS, PATCH, Case, E, Inputs, eager_code, forced
from vjepa_fast import ops
from vjepa_fast.models import rope
from vjepa_fast.reference import losses
from vjepa_fast.reference.model import Attention


def rope3d(x: Inputs) -> Case:
    k, d = 576, E // HEADS
    table = rope.rope_table(GRID, d, "v2.1", 16, torch.float32, x.device, False)[:k].contiguous()
    qkv = x.randn(x.batch, k, 3 * E, seed=1, grad=True)
    part = Attention(E, HEADS, PATCH, 14, True, "v2.1")
    place = torch.arange(k, device=x.device)
    t, y, w = place // 196, place % 196 // 14, place % 14
    axes = (1.0 * t, y * 15 / 13, w * 15 / 13)

    def published():
        q, key, v = qkv.unflatten(-1, (3, HEADS, d)).permute(2, 0, 3, 1, 4)
        turned = [part._rotate_axes(losses.full(u), axes).to(x.dtype) for u in (q, key)]
        return torch.stack([*turned, v]).permute(1, 3, 0, 2, 4).flatten(2)

    def plain():
        out = torch.empty_like(qkv)
        eager_code("rope3d")(qkv, table, HEADS, False, out)
        return out

    moved = 2 * qkv.numel() * x.size + table.numel() * 4
    return Case(
        "rope3d",
        f"B{x.batch} K{k} E{E}",
        {
            "reference": published,
            "eager": forced("eager", lambda: ops.rope3d(qkv, table, HEADS)),
            "fused": lambda: ops.rope3d(qkv, table, HEADS),
        },
        leaves=[qkv],
        compile_=published,
        floor_bytes=moved,
        floor_full=2 * moved,
        atol=1e-4 if x.size == 4 else 5e-2,
    )


CASES = {"rope3d": rope3d}
