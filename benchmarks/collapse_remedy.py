"""A run that collapses, and the same run with each remedy that the training log names: docs/training.md shows both.

    python benchmarks/collapse_remedy.py            # about two minutes on one core; runs/collapse_remedy has the videos

Writes benchmarks/results/collapse_remedy.json (the monitors of each run, its settings and what its log said) and
docs/images/collapse_remedy.svg. No accuracy is measured, so nothing is chosen by one.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
CLIPS, STEPS = 240, 150
COLLAPSING = (  # a fast teacher, a high learning rate and one target level
    "model.levels=1",
    'objectives={"pred": {"loss_exp": 1.0}}',
    "target.ema=[0.9,0.9]",
    "optimization.lr=3.0e-3",
    "optimization.start_lr=3.0e-3",
    "optimization.final_lr=3.0e-3",
    "optimization.warmup=0",
    "optimization.epochs=1",
    f"optimization.ipe={STEPS}",
    "data.batch_size=16",
    "runtime.monitor_every=10",
    "runtime.log_every=10",
    "runtime.threads=1",
)
RUNS = {  # name -> what differs from the collapsing run
    "collapsing": (),
    "EMA closer to 1": ("target.ema=[0.998,0.9999]",),
    "lower learning rate": tuple(f"optimization.{k}=3.0e-4" for k in ("lr", "start_lr", "final_lr")),
    "SIGReg": ('objectives={"pred": {"loss_exp": 1.0}, "sigreg": {"coeff": 0.1}}',),
}


def run(name: str, changes: tuple[str, ...], folder: Path, manifest: str) -> dict:
    """Train one of RUNS: {"name", "changes", "step", "rankme", "target_std", "warned", "cpu_seconds"}."""
    from vjepa_fast import config
    from vjepa_fast.metrics.collapse import CollapseWatch
    from vjepa_fast.trainer import train

    settings = [*COLLAPSING, *changes, f'data.datasets=["{manifest}"]', f"folder={folder / name.replace(' ', '_')}"]
    rows, watch, said, began = [], CollapseWatch(), [], time.process_time()

    def on_log(row: dict) -> None:
        rows.append(row)
        said.extend(f"step {row['step']}: {line}" for line in watch(row["monitors"]))

    train(config.load("demo_baseline_single", settings), resume=False, on_log=on_log)
    shown = [r for r in rows if r["monitors"]]
    return {
        "name": name,
        "changes": list(changes),
        "step": [r["step"] for r in shown],
        "rankme": [round(r["monitors"]["rankme"], 3) for r in shown],
        "target_std": [round(r["monitors"]["target_var"] ** 0.5, 4) for r in shown],
        "warned": said,
        "cpu_seconds": round(time.process_time() - began, 1),
    }


def draw(runs: list[dict]) -> str:
    """RankMe and the target's standard deviation over the steps, with the limits, as SVG."""
    from vjepa_fast.metrics.collapse import RANK_LIMIT, STD_LIMIT
    from vjepa_fast.study.figures import COLOURS, INK, figure, legend, svg

    panels = {
        "rankme": ("RankMe of the target", RANK_LIMIT),
        "target_std": ("standard deviation of the target", STD_LIMIT),
    }
    with figure(9.2, 3.4, 1, 2) as (drawn, axes):
        handles = {}
        for axis, (key, (title, limit)) in zip(axes, panels.items()):
            for colour, made in zip(("#D55E00", *np.delete(COLOURS, 1)), runs):
                width = 2.4 if not made["changes"] else 1.6
                (handles[made["name"]],) = axis.plot(made["step"], made[key], color=colour, linewidth=width)
            axis.axhline(limit, color=INK, linewidth=0.9, linestyle=(0, (4, 3)))
            axis.set_title(title, loc="left")
            axis.set_xlabel("step")
            axis.set_ylim(0, None)
        legend(drawn, handles, 4)
        return svg(drawn)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--folder", type=Path, default=ROOT / "runs" / "collapse_remedy")
    parser.add_argument("--json", type=Path, default=ROOT / "benchmarks" / "results" / "collapse_remedy.json")
    parser.add_argument("--svg", type=Path, default=ROOT / "docs" / "images" / "collapse_remedy.svg")
    args = parser.parse_args()
    from vjepa_fast.data.synthetic import render_suite
    from vjepa_fast.files import write_json, write_text

    manifest = render_suite("motion8", args.folder / "motion8", splits={"train": CLIPS}, size=64, frames=16)["train"]
    runs = [run(name, changes, args.folder, str(manifest)) for name, changes in RUNS.items()]
    write_json(args.json, {"format": 1, "recipe": "demo_baseline_single", "settings": list(COLLAPSING), "runs": runs})
    write_text(args.svg, draw(runs))
    for made in runs:
        print(f"{made['name']}: RankMe {made['rankme'][-1]}, target std {made['target_std'][-1]}")


if __name__ == "__main__":
    main()
