"""The ops as they are benchmarked, one module per op of vjepa_fast/ops.

For each case the published algorithm (``reference``), our eager code, the same under ``torch.compile``, and the fused
op. Every function of a case computes the same from the same inputs; ``bench_ops.py`` compares the results first.
"""

from __future__ import annotations

from collections.abc import Callable

from benchmarks.ops import add_norm, block_masks, distance, gelu, latent, norm, patchify, product, rope, saliency
from benchmarks.ops._inputs import Case, Inputs

CASES: dict[str, Callable[[Inputs], Case]] = {
    name: case
    for module in (patchify, saliency, block_masks, distance, latent, rope, norm, add_norm, gelu, product)
    for name, case in module.CASES.items()
}
ON_GPU = {*add_norm.CASES, *gelu.CASES}  # of blocks on a GPU: a CPU has no kernels for them
