"""Do the laptop recipes beat random init on novel classes? Renders, trains each recipe over seeds, reads frozen.

    python benchmarks/laptop_recipes.py                      # everything; what is rendered or trained is kept
    python benchmarks/laptop_recipes.py --seeds 0 --part val # one seed, validation classes

Readout, the same for every encoder: last/tdiff/standard/cosine (docs/fewshot.md), without labels of base clips.
Novel classes are read once, at the end. Writes benchmarks/results/laptop_recipes.json.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

if TYPE_CHECKING:
    from vjepa_fast.config.schema import Config
    from vjepa_fast.data.synthetic import Suite
    from vjepa_fast.models.vit import VisionTransformer

HERE = Path(__file__).resolve().parent
RECIPES = ("laptop_vjepa", "laptop_vjepa_sigreg", "laptop_pixels", "laptop_frozen")
TEACHER = {"laptop_frozen": "laptop_pixels"}  # whose encoder of the same seed is the frozen target
POOL = ("motion8", "dive", "order", "objects")  # what is pretrained on
CLIPS, BASE, EACH = 1000, 8, {"val": 30, "test": 20}  # of each pool; of each class of fewshot
PARTS = {"val": "val", "novel": "test"}
SIZE, FRAMES, STEP = 48, 8, 2
READOUT = "last/tdiff/standard/cosine"
SHOTS, EPISODES, QUERIES = (1, 5), 1500, 10


def pool() -> dict[str, Suite]:
    """What is pretrained on. ``motion8`` and ``objects`` are in colour by themselves; ``dive`` and ``order``, on grey
    where they are read, get backgrounds in colour here, and ``dive`` all headings, sizes and directions of growth.
    """
    from vjepa_fast.data.synthetic import SUITES, TextureConfig

    changes = {"dive": {"shrinks": True, "headings": 180.0, "radius": (9.0, 14.0)}, "order": {}}
    coloured = {
        name: dataclasses.replace(SUITES[name], background=TextureConfig(), **more) for name, more in changes.items()
    }
    return {name: coloured.get(name, SUITES[name]) for name in POOL}


def render(folder: Path, seed: int) -> dict[str, str]:
    """Manifests by ``suite/split``, of the pool and of ``fewshot``: row stores, every pixel as it was drawn."""
    from vjepa_fast.data.synthetic import SUITES, render_suite

    fewshot = SUITES["fewshot"]
    sizes = {split: n * len(fewshot.split_labels(split)) for split, n in ({"train": BASE} | EACH).items()}
    found = {}
    for suite, splits in [*((suite, {"train": CLIPS}) for suite in pool().values()), (fewshot, sizes)]:
        target, frames = folder / "suites" / suite.name, FRAMES * STEP
        made = render_suite(suite, target, splits=splits, size=SIZE, frames=frames, seed=seed, form="rows")
        found |= {f"{suite.name}/{split}": path for split, path in made.items()}
    return found


def train(cfg: Config) -> dict[str, Any]:
    """The run, or what an earlier call has left of it: folder, CPU minutes, curves."""
    from vjepa_fast.study.records import read_metrics
    from vjepa_fast.trainer import train as run

    folder, timing = Path(cfg.folder), Path(cfg.folder) / "cpu_seconds.json"
    if not timing.exists():
        began, wall = time.process_time(), time.time()
        run(cfg, resume=False)
        timing.write_text(json.dumps({"cpu": time.process_time() - began, "wall": time.time() - wall}))
    took, rows = json.loads(timing.read_text()), read_metrics(folder)
    monitors = [r for r in rows if r["monitors"]]
    return {
        "cpu_minutes": round(took["cpu"] / 60, 2),
        "step": [r["step"] for r in rows],
        "loss": [round(r["loss"], 5) for r in rows],
        "monitor_step": [r["step"] for r in monitors],
        **{name: [round(r["monitors"][name], 3) for r in monitors] for name in ("rankme", "feature_std", "target_var")},
    }


def read(encoder: VisionTransformer | str, manifests: dict[str, str], part: str) -> list[dict[str, Any]]:
    """Rows of shots, accuracy and half-width of its 95 % interval over episodes; ``encoder`` or "pixels"."""
    from vjepa_fast.data import load_manifest
    from vjepa_fast.evaluation import readout
    from vjepa_fast.evaluation.fewshot.protocols import EpisodeProtocol

    rule = EpisodeProtocol("laptop", 5, SHOTS, QUERIES, EPISODES, 2)
    name = "input/pixels/standard/cosine" if encoder == "pixels" else READOUT
    base, own = (load_manifest(manifests[f"fewshot/{split}"]) for split in ("train", PARTS[part]))
    fitted = readout.fit(encoder, readout.Readout.from_name(name), base)
    return [
        {"shot": r.shot, "accuracy": round(r.mean, 4), "half_width": round(r.ci95, 4)}
        for r in readout.read(encoder, fitted, own, rule)
    ]


def page(result: dict[str, Any]) -> str:
    """The result as the table of docs/training.md: a row per encoder, a column per seed."""
    seeds = sorted({r["seed"] for r in result["rows"] if r["seed"] is not None})
    minutes = {name: [c["cpu_minutes"] for c in result["curves"] if c["recipe"] == name] for name in RECIPES}
    five, one = ({(r["encoder"], r["seed"]): r for r in result["rows"] if r["shot"] == shot} for shot in (5, 1))
    lines = ["| encoder | " + " | ".join(f"seed {s}" for s in seeds) + " | 1-shot | CPU minutes |"]
    lines.append("| --- |" + " --- |" * (len(seeds) + 2))
    for name in dict.fromkeys(r["encoder"] for r in result["rows"]):
        own = [five.get((name, s)) or five[name, None] for s in seeds]
        cells = [f"{100 * r['accuracy']:.1f} +- {100 * r['half_width']:.1f}" for r in own]
        single = [100 * r["accuracy"] for (encoder, _), r in one.items() if encoder == name]
        took = f"{sum(minutes[name]) / len(seeds):.1f}" if name in minutes else "-"
        lines.append(f"| {name} | {' | '.join(cells)} | {sum(single) / len(single):.1f} | {took} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--folder", type=Path, default=Path("runs/laptop"))
    parser.add_argument("--recipes", nargs="+", default=list(RECIPES))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--part", choices=list(PARTS), default="novel", help="classes of fewshot that are read")
    parser.add_argument("--render-seed", type=int, default=7, help="of the clips")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="overrides of the recipes")
    parser.add_argument("--json", type=Path, default=HERE / "results" / "laptop_recipes.json")
    args = parser.parse_args()

    import torch

    from vjepa_fast import config
    from vjepa_fast.evaluation.controls import random_encoder
    from vjepa_fast.files import write_json
    from vjepa_fast.models import load_encoder
    from vjepa_fast.trainer.run_folder import versions

    torch.set_num_threads(1)
    manifests = render(args.folder, args.render_seed)
    data = ",".join(manifests[f"{name}/train"] for name in POOL)
    rows: list[dict[str, Any]] = []
    curves: list[dict[str, Any]] = []

    def add(encoder: str, seed: int | None, found: list[dict[str, Any]]) -> None:
        rows.extend({"encoder": encoder, "seed": seed, "part": args.part, **row} for row in found)
        print(encoder, seed, *(f"{r['shot']}-shot {100 * r['accuracy']:.1f}" for r in found), flush=True)

    add("pixels", None, read("pixels", manifests, args.part))
    for seed in args.seeds:
        first = True
        for recipe in args.recipes:
            own = [f"data.datasets=[{data}]", f"seed={seed}", f"folder={args.folder}/{recipe}_seed{seed}"]
            if recipe in TEACHER:
                own.append(f"target.path={args.folder}/{TEACHER[recipe]}_seed{seed}")
            cfg = config.load(recipe, [*own, "runtime.threads=1", *args.set])
            if first:
                for init in dict.fromkeys((cfg.model.init, "fixed")):
                    control = random_encoder(config.load(recipe, [*own, f"model.init={init}"]))
                    add(f"random, init {init}", seed, read(control, manifests, args.part))
            first = False
            curves.append({"recipe": recipe, "seed": seed, **train(cfg)})
            add(recipe, seed, read(load_encoder(cfg.folder), manifests, args.part))
    about = versions(torch.device("cpu"), torch.float32)
    result = {
        "format": 1,
        "command": " ".join(["python benchmarks/laptop_recipes.py", *sys.argv[1:]]),
        "device": f"CPU, one thread of {os.cpu_count()}",
        "commit": about.get("commit", ""),
        "versions": about,
        "readout": READOUT,
        "rows": rows,
        "curves": curves,
    }
    write_json(args.json, result)
    print(page(result))
    print(f"wrote {args.json}")


if __name__ == "__main__":
    main()
