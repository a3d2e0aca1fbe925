"""What a step cannot do without: FLOP and bytes of each part (vjepa_fast/metrics/flops.py), as a Markdown table.

    python benchmarks/step_floor.py                                    # the published step: ViT-B/16, batch 8, bfloat16
    python benchmarks/step_floor.py --recipe my.yaml --set data.batch_size=64 --tflops 989 --bandwidth 4.8

Masks are drawn as the recipe says, on clips of noise, and their lengths averaged. ``--tflops`` and ``--bandwidth``
(TB/s) turn the counts into the least time of a part: the longer of the two.
"""

from __future__ import annotations

import argparse
import statistics
import textwrap

from vjepa_fast import config, models
from vjepa_fast.metrics import flops
from vjepa_fast.trainer.building import build_samplers

FIXED = ("data.datasets=[]", "data.datasets_weights=null")


def mean_lengths(cfg, draws: int = 16) -> list[tuple[float, float]]:
    """(context, predicted) tokens of each mask, the mean over batches of the configured size."""
    import torch

    d = cfg.data
    shape = (d.batch_size, 3, max(d.dataset_fpcs), d.crop_size, d.crop_size)
    guided = any(spec.motion_guided for spec in cfg.masks.specs)  # else only the shape matters
    clip = torch.zeros(1, dtype=torch.uint8).expand(shape)
    if guided:
        clip = torch.randint(0, 256, shape, dtype=torch.uint8)
    sampler, _ = build_samplers(cfg)
    found = [sampler(clip, step=i, first_sample=0) for i in range(draws)]
    kinds = [[[m.shape[1] for m in masks[kind]] for masks in found] for kind in (0, 1)]
    return [(statistics.mean(e), statistics.mean(p)) for e, p in zip(zip(*kinds[0]), zip(*kinds[1]))]


def table(cfg, tflops: float, bandwidth: float) -> str:
    dims = flops.Dims.of(*models.build_from_config(cfg, device="meta"))
    d, n = cfg.data, cfg.data.batch_size
    tokens = max(d.dataset_fpcs) // d.tubelet_size * (d.crop_size // d.patch_size) ** 2
    masks = mean_lengths(cfg)
    itemsize = 4 if cfg.runtime.dtype == "float32" else 2
    online = cfg.target.mode == "online"
    cost = flops.step_cost(
        dims,
        [flops.Clips(n, tokens, masks)],
        itemsize=itemsize,
        predict_context="context" in cfg.objectives,
        target_grad=online,
    )
    kept = ", ".join(f"{e:.0f} + {p:.0f}" for e, p in masks)
    about = (
        f"{cfg.model.model_name}, {max(d.dataset_fpcs)} x {d.crop_size} x {d.crop_size}, batch {n}, "
        f"{8 * itemsize}-bit activations, {tokens} tokens, context + predicted tokens per mask {kept}; "
        f"at {tflops:g} TFLOP/s and {bandwidth:g} TB/s:"
    )
    lines = [
        textwrap.fill(about, 118),
        "",
        "| part | GFLOP per clip | MB per clip | FLOP per byte | least ms per step |",
        "|---|---|---|---|---|",
    ]
    total = flops.Cost()
    least = 0.0
    for part, c in cost.items():
        ms = 1e3 * max(c.flops / (1e12 * tflops), c.bytes / (1e12 * bandwidth))
        least += ms
        total.add(c.flops, c.bytes)
        lines.append(_line(part, c, n, ms))
    return "\n".join([*lines, _line("step", total, n, least)])


def _line(part: str, c: flops.Cost, clips: int, ms: float) -> str:
    rate = c.flops / c.bytes if c.bytes else 0
    return f"| {part} | {c.flops / clips / 1e9:.1f} | {c.bytes / clips / 1e6:.0f} | {rate:.0f} | {ms:.2f} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--recipe", default="mixed_4gpu_baseline")
    parser.add_argument("--set", dest="overrides", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--tflops", type=float, default=989, help="of the device, dense (default 989: H200, bfloat16)")
    parser.add_argument("--bandwidth", type=float, default=4.8, help="of its memory in TB/s (default 4.8: H200)")
    args = parser.parse_args()
    print(table(config.load(args.recipe, [*FIXED, *args.overrides]), args.tflops, args.bandwidth))


if __name__ == "__main__":
    main()
