"""How many tokens each ``masks.truncate`` keeps: ``python benchmarks/mask_tokens.py [RECIPE] [--batch 8 32 64]``.

Masks without motion, of the recipe's frames and crop; means over steps and samples. ``--json PATH`` writes them too.
"""

from __future__ import annotations

import argparse

import torch

from vjepa_fast import config
from vjepa_fast.files import write_json
from vjepa_fast.ops import sample_block_masks


def kept(cfg: config.Config, batch: int, steps: int) -> list[dict[str, float]]:
    """Per mask: tokens of a sample in context and prediction under ``none`` and ``batch`` (``random``: as many)."""
    data = cfg.data
    side = data.crop_size // data.patch_size
    grid = max(1, max(data.dataset_fpcs) // data.tubelet_size), side, side
    lengths = {}
    for truncate in ("none", "batch"):
        drawn = (sample_block_masks(batch, grid, cfg.masks.specs, seed=cfg.seed, step=step, truncate=truncate)
                 for step in range(steps))  # fmt: skip
        lengths[truncate] = torch.stack([torch.stack([m.enc_len, m.pred_len]) for m in drawn]).double().mean((0, 3))
    names = [(truncate, i, name) for truncate in lengths for i, name in enumerate(("context", "predicted"))]
    return [{f"{name} {truncate}": float(lengths[truncate][i, s]) for truncate, i, name in names}
            for s in range(len(cfg.masks.specs))]  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("recipe", nargs="?", default="mixed_4gpu_baseline")
    parser.add_argument("--batch", type=int, nargs="+", default=[8, 32, 64])
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--json", metavar="PATH", help="also write the means as JSON")
    args = parser.parse_args()
    cfg = config.load(args.recipe)
    print("| batch | mask | context tokens, none | kept by batch | predicted tokens, none | kept by batch |")
    print("|---|---|---|---|---|---|")
    found = []
    for batch in args.batch:
        for s, row in enumerate(kept(cfg, batch, args.steps)):
            found.append({"recipe": args.recipe, "steps": args.steps, "batch": batch, "mask": s, **row})
            cells = [f"{row[f'{name} none']:.0f} | {row[f'{name} batch'] / row[f'{name} none']:.0%}"
                     for name in ("context", "predicted")]  # fmt: skip
            print(f"| {batch} | {s} | {' | '.join(cells)} |")
    if args.json:
        write_json(args.json, found)


if __name__ == "__main__":
    main()
