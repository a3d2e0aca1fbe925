"""Does training with the fast step go where the published one goes? 200 steps from the same weights, clips and masks.

    python benchmarks/training_curves.py            # some minutes on one core; runs/training_curves holds the videos
    python benchmarks/training_curves.py --device cuda --json captured.json --png captured.png

On CUDA the fast step has streams of fixed capacity and is replayed as a CUDA graph.

Three runs on rendered videos, with the objectives of the headline recipe: the reference in float32, the reference in
bfloat16 autocast (so the two differ only in how numbers are rounded), and the fast step in float32. The *spread* at a
step is the distance of the two reference losses, |bfloat16 - float32|, averaged over the last ``WINDOW`` steps. The
distance of the fast step from the float32 reference, averaged likewise, must not exceed the largest spread so far. (So
far: training amplifies rounding until two runs are as far apart as they get, and then the distance of any two goes up
and down by chance. Steps beyond the spread of that very step are counted too.) Writes
benchmarks/results/training_curves.json and docs/images/training_curves.png; exit code 1 if the curve leaves the spread.
"""

from __future__ import annotations

import argparse
import itertools
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
STEPS, WINDOW = 200, 20
OVERRIDES = (
    "data.dataset_fpcs=[8]",
    "data.datasets_weights=null",
    "data.batch_size=4",
    "data.crop_size=48",
    "data.patch_size=8",
    "data.frame_sample_rate=1",
    "data.num_workers=0",
    "data.pin_mem=false",
    "data.cache_mb=300",
    "model.embed_dim=96",
    "model.depth=4",
    "model.num_heads=3",
    "model.pred_embed_dim=48",
    "model.pred_depth=3",
    "model.pred_num_heads=3",
    "model.use_activation_checkpointing=false",
    "loss.context_warmup=[0.1,0.3]",
    "objectives.ld.hidden_dim=64",
    "optimization.epochs=10",
    "optimization.ipe=20",
    "optimization.warmup=1",
    "optimization.lr=1.0e-3",
    "optimization.final_lr=1.0e-4",
    "target.ema=[0.99,0.99]",
    "runtime.dtype=float32",
    "runtime.tensorboard=false",
)


DEVICES = {
    "cpu": ("runtime.device=cpu",),
    "cuda": ("runtime.device=cuda", "runtime.capacity_quantum=64", "runtime.cuda_graphs=true"),
}


def curves(cfg, steps: int) -> dict[str, list[float]]:
    """Losses of each run, by turns on the same batches."""
    import torch

    from vjepa_fast.bench.providers import reference_of
    from vjepa_fast.data.loader import ClipLoader
    from vjepa_fast.trainer.step import TrainStep

    fast = TrainStep(cfg, device=cfg.runtime.device)
    references = {
        "reference": reference_of(cfg, fast),
        "reference_bfloat16": reference_of(cfg, fast, dtype=torch.bfloat16),
    }
    losses: dict[str, list[float]] = {name: [] for name in ("vjepa_fast", *references)}
    began = time.time()
    for index, batch in zip(range(steps), ClipLoader(cfg)):
        clips, enc, pred = [g.clip.to(fast.device) for g in batch.groups], [], []
        for n, (clip, group) in enumerate(zip(clips, batch.groups)):
            e, p = fast.sampler(clip, step=index, first_sample=group.first_sample, group=n)
            enc.append(e)
            pred.append(p)
        for name, step in references.items():
            losses[name].append(float(step(clips, enc, pred)["loss"]))
        losses["vjepa_fast"].append(float(fast(batch, index).loss))
        if (index + 1) % 20 == 0:
            latest = ", ".join(f"{name} {values[-1]:.6f}" for name, values in losses.items())
            print(f"step {index + 1}: {latest} ({time.time() - began:.0f} s)", flush=True)
    return losses


def smoothed(a: list[float], b: list[float]) -> list[float]:
    """|a - b|, averaged over the last ``WINDOW`` steps."""
    gaps = [abs(x - y) for x, y in zip(a, b)]
    return [sum(gaps[max(0, i + 1 - WINDOW) : i + 1]) / min(i + 1, WINDOW) for i in range(len(gaps))]


def plot(losses: dict[str, list[float]], gap: list[float], spread: list[float], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    steps = range(1, len(gap) + 1)
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4), layout="constrained")
    left.plot(steps, losses["reference"], color="0.75", lw=5, label="reference, float32")
    left.plot(steps, losses["reference_bfloat16"], color="C1", lw=1.2, ls="--", label="reference, bfloat16 autocast")
    left.plot(steps, losses["vjepa_fast"], color="C0", lw=1.2, label="vjepa_fast, float32")
    left.set(title="Total loss: same weights, clips and masks", xlabel="step", ylabel="loss")
    left.legend()
    right.plot(steps, spread, color="C1", ls="--", label="spread: reference bfloat16 to float32")
    right.plot(steps, list(itertools.accumulate(spread, max)), color="C1", lw=0.8, label="its largest value so far")
    right.plot(steps, gap, color="C0", label="vjepa_fast to reference, both float32")
    right.set(
        title=f"Distance of the losses, mean of the last {WINDOW} steps",
        xlabel="step",
        yscale="log",
        ylabel="|difference of loss|",
    )
    right.legend()
    for axes in (left, right):
        axes.grid(alpha=0.3)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--recipe", default="mixed_4gpu_fwm_hw_ld")
    parser.add_argument("--device", choices=list(DEVICES), default="cpu")
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--clips", type=int, default=400, help="videos to render")
    parser.add_argument("--folder", type=Path, default=Path("runs/training_curves"), help="for the rendered videos")
    parser.add_argument("--json", type=Path, default=ROOT / "benchmarks" / "results" / "training_curves.json")
    parser.add_argument("--png", type=Path, default=ROOT / "docs" / "images" / "training_curves.png")
    args = parser.parse_args()

    import torch

    from vjepa_fast import config
    from vjepa_fast.data.synthetic import render_suite
    from vjepa_fast.files import write_json
    from vjepa_fast.trainer.run_folder import versions

    manifest = render_suite("motion8", args.folder, splits={"train": args.clips}, size=64, frames=16, seed=0)["train"]
    overrides = [*OVERRIDES, *DEVICES[args.device]]
    cfg = config.load(args.recipe, [*overrides, f"data.datasets=[{manifest}]"])
    began = time.time()
    losses = curves(cfg, args.steps)
    gap = smoothed(losses["vjepa_fast"], losses["reference"])
    spread = smoothed(losses["reference_bfloat16"], losses["reference"])
    so_far = list(itertools.accumulate(spread, max))
    outside = [i + 1 for i, (a, b) in enumerate(zip(gap, so_far)) if a > b]
    result = {
        "recipe": args.recipe,
        "overrides": overrides,
        "steps": args.steps,
        "window": WINDOW,
        "steps_outside_the_spread": outside,
        "largest_distance": max(gap),
        "largest_spread": max(spread),
        "steps_beyond_the_spread_of_that_step": [i + 1 for i, (a, b) in enumerate(zip(gap, spread)) if a > b],
        "largest_share_of_the_spread": max(a / b if b else float(a > 0) for a, b in zip(gap, so_far)),
        "minutes": round((time.time() - began) / 60, 1),
        "versions": versions(torch.device(args.device), torch.float32),
        "losses": losses,
    }
    write_json(args.json, result)
    plot(losses, gap, spread, args.png)
    print(
        f"distance to the reference at most {max(gap):.2e}, spread at most {max(spread):.2e}; "
        f"outside the spread at {len(outside)} of {args.steps} steps; wrote {args.json} and {args.png}"
    )
    return 1 if outside else 0


if __name__ == "__main__":
    sys.exit(main())
