"""The ops as they are benchmarked, one module per op of vjepa_fast/ops.

For each case the published algorithm (``reference``), our eager code, the same under ``torch.compile``, and the fused
op. Every function of a case computes the same from the same inputs; ``bench_ops.py`` compares the results first.
"""

from __future__ import annotations

from collections.abc import Callable

from benchmarks.ops import block_masks, distance, latent, norm, patchify, product, rope, saliency
from benchmarks.ops._inputs import Case, Inputs

CASES: dict[str, Callable[[Inputs], Case]] = {
    name: case
    for module in (patchify, saliency, block_masks, distance, latent, rope, norm, product)
    for name, case in module.CASES.items()
}
