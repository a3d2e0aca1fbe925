"""target_norm of all levels."""

from __future__ import annotations

from benchmarks.ops._inputs import LEVELS, Case, E, Inputs, N, forced
from vjepa_fast import ops
from vjepa_fast.reference.step import normalize_levels


def target_norm(x: Inputs) -> Case:
    h = x.randn(x.batch, N, LEVELS * E, seed=1, grad=True)
    moved = 2 * h.numel() * x.size
    return Case(
        "target_norm",
        f"B{x.batch} D{LEVELS * E}",
        {
            "reference": lambda: normalize_levels(h, LEVELS),
            "eager": forced("eager", lambda: ops.target_norm(h, LEVELS)),
            "fused": lambda: ops.target_norm(h, LEVELS),
        },
        leaves=[h],
        compile_=lambda: normalize_levels(h, LEVELS),
        floor_bytes=moved,
        floor_full=moved + 3 * h.numel() * x.size,
        atol=1e-4 if x.size == 4 else 5e-2,
    )


CASES = {"target_norm": target_norm}
