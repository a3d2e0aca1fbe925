"""mask_distance of both masks."""

from __future__ import annotations

from benchmarks.ops._inputs import GRID, Case, Inputs, eager_code
from vjepa_fast import ops
from vjepa_fast.reference.mask_distance import mask_distance


def mask_distances(x: Inputs) -> Case:
    enc, pred = x.masks()

    def ours():
        return [ops.mask_distance(e, p, GRID) for e, p in zip(enc, pred)]

    def plain():
        return [eager_code("mask_distance")(e, p, *GRID, 1) for e, p in zip(enc, pred)]

    return Case(
        "mask_distance",
        f"B{x.batch} 2 masks",
        {"reference": lambda: [mask_distance(e, p, GRID) for e, p in zip(enc, pred)], "eager": plain, "fused": ours},
    )


CASES = {"mask_distance": mask_distances}
