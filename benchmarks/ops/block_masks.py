"""sample_block_masks without a motion map."""

from __future__ import annotations

from benchmarks.ops._inputs import GRID, SPECS, Case, Inputs, forced
from vjepa_fast import ops


def block_masks(x: Inputs) -> Case:
    def ours():
        return ops.sample_block_masks(x.batch, GRID, SPECS, seed=0, step=3, device=x.device).enc

    return Case("sample_block_masks", f"B{x.batch} 2 masks", {"eager": forced("eager", ours), "fused": ours})


CASES = {"sample_block_masks": block_masks}
