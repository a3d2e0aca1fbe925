"""How many tokens each ``masks.truncate`` keeps: ``python benchmarks/mask_tokens.py [RECIPE] [--batch 8 32 64]``.

Masks without motion, of the recipe's frames and crop; means over steps and samples. ``--json PATH`` writes them too.
``--capacity`` counts instead how many pairs of capacities (``runtime.capacity_quantum: auto``) these steps meet, and
how many rows they have for each context and predicted token.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from typing import Any

import torch

from vjepa_fast import config
from vjepa_fast.files import write_json
from vjepa_fast.layers.packed import stream
from vjepa_fast.ops import BlockMasks, sample_block_masks

TRUNCATE = ("none", "batch")


def draws(cfg: config.Config, batch: int, steps: int, truncate: str) -> Iterator[BlockMasks]:
    """The masks of each step."""
    data = cfg.data
    side = data.crop_size // data.patch_size
    grid = max(1, max(data.dataset_fpcs) // data.tubelet_size), side, side
    for step in range(steps):
        yield sample_block_masks(batch, grid, cfg.masks.specs, seed=cfg.seed, step=step, truncate=truncate)


def rooms(cfg: config.Config, batch: int, steps: int) -> list[dict[str, Any]]:
    """Per ``masks.truncate``: distinct lengths of the streams, pairs of capacities, and rows over tokens."""
    found = []
    for truncate in TRUNCATE:
        pairs, exact, rows, tokens = set(), set(), 0, 0
        for masks in draws(cfg, batch, steps, truncate):
            streams = stream(masks)
            pairs.add(tuple(s.shape[1] for s in streams))
            exact.add(tuple(sum(s.lengths) for s in streams))
            rows += sum(s.shape[1] for s in streams)
            tokens += sum(sum(s.lengths) for s in streams)
        found.append({"truncate": truncate, "lengths": len(exact), "capacities": len(pairs), "rows": rows / tokens})
    return found


def kept(cfg: config.Config, batch: int, steps: int) -> list[dict[str, float]]:
    """Per mask: tokens of a sample in context and prediction under ``none`` and ``batch`` (``random``: as many)."""
    lengths = {}
    for truncate in TRUNCATE:
        drawn = draws(cfg, batch, steps, truncate)
        lengths[truncate] = torch.stack([torch.stack([m.enc_len, m.pred_len]) for m in drawn]).double().mean((0, 3))
    names = [(truncate, i, name) for truncate in lengths for i, name in enumerate(("context", "predicted"))]
    return [
        {f"{name} {truncate}": float(lengths[truncate][i, s]) for truncate, i, name in names}
        for s in range(len(cfg.masks.specs))
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("recipe", nargs="?", default="mixed_4gpu_baseline")
    parser.add_argument("--batch", type=int, nargs="+", default=[8, 32, 64])
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--capacity", action="store_true", help="count capacities instead")
    parser.add_argument("--json", metavar="PATH", help="also write the numbers as JSON")
    args = parser.parse_args()
    cfg = config.load(args.recipe)
    found = capacities(cfg, args) if args.capacity else tokens(cfg, args)
    if args.json:
        write_json(args.json, found)


def capacities(cfg: config.Config, args: argparse.Namespace) -> list[dict[str, Any]]:
    """The table of ``--capacity``, printed, and its rows."""
    print("| batch | truncate | lengths met | pairs of capacities | rows over tokens |")
    print("|---|---|---|---|---|")
    found = []
    for batch in args.batch:
        for row in rooms(cfg, batch, args.steps):
            found.append({"recipe": args.recipe, "steps": args.steps, "batch": batch, **row})
            print(f"| {batch} | {row['truncate']} | {row['lengths']} | {row['capacities']} | {row['rows']:.2f} |")
    return found


def tokens(cfg: config.Config, args: argparse.Namespace) -> list[dict[str, Any]]:
    """The table of the tokens kept, printed, and its rows."""
    print("| batch | mask | context tokens, none | kept by batch | predicted tokens, none | kept by batch |")
    print("|---|---|---|---|---|---|")
    found = []
    for batch in args.batch:
        for s, row in enumerate(kept(cfg, batch, args.steps)):
            found.append({"recipe": args.recipe, "steps": args.steps, "batch": batch, "mask": s, **row})
            cells = [
                f"{row[f'{name} none']:.0f} | {row[f'{name} batch'] / row[f'{name} none']:.0%}"
                for name in ("context", "predicted")
            ]
            print(f"| {batch} | {s} | {' | '.join(cells)} |")
    return found


if __name__ == "__main__":
    main()
