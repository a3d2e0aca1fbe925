"""What a run on 8, 64 and 512 GPUs would take, by arithmetic: reading, storage, all-reduce, checkpoints, failures.

    python benchmarks/scaling_plan.py                               # prints the tables
    python benchmarks/scaling_plan.py --page docs/scaling.md        # and writes them into the page

Measured: the step of one H100 (`benchmarks/results/h100/captured.json`), the processor time of reading a clip
(`benchmarks/results/data.json`). Counted: parameters and FLOP of each size (vjepa_fast/metrics/flops.py). Everything
else is an assumption, and stands in `ASSUMED` with where it comes from. Nothing here has run on more than one GPU.
"""

from __future__ import annotations

import argparse
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from vjepa_fast import config
from vjepa_fast.files import write_text
from vjepa_fast.metrics import flops
from vjepa_fast.trainer.building import build_models

RESULTS = Path(__file__).parent / "results"
BEGIN, END = "<!-- scaling plan -->\n", "<!-- end of scaling plan -->"
RECIPE = "mixed_4gpu_baseline"
GPUS, CLIPS = (8, 64, 512), 1e9
SIZES = {  # name -> model.model_name, clips per GPU and step, how weights are held
    "ViT-B": ("vit_base", 64, "ddp"),
    "ViT-L": ("vit_large", 24, "ddp"),
    "ViT-g": ("vit_giant_xformers", 8, "fsdp"),
    "ViT-G": ("vit_gigantic_xformers", 8, "fsdp"),
}


@dataclass(frozen=True)
class Assumed:
    """A number that was not measured here, and where it comes from."""

    value: float
    unit: str
    what: str
    source: str


ASSUMED = {
    "node": Assumed(8, "GPUs", "in a node", "NVIDIA DGX H100 data sheet"),
    "nvlink": Assumed(900, "GB/s", "NVLink of a GPU, both directions together", "NVIDIA H100 data sheet"),
    "nic": Assumed(50, "GB/s", "network of a GPU, one direction (400 Gb/s)", "NVIDIA DGX H100 data sheet"),
    "reached": Assumed(0.7, "", "share of either that a large all-reduce reaches", "an assumption"),
    "mtbf": Assumed(
        round(16384 * 54 * 24 / 419),
        "GPU hours",
        "between failures that stop a run (419 in 54 days on 16,384 H100)",
        "The Llama 3 Herd of Models, arXiv:2407.21783, section 3.3.4",
    ),
    "restart": Assumed(10, "min", "from a failure to the first new step", "an assumption"),
    "save_every": Assumed(30, "min", "between checkpoints", "an assumption"),
    "disk": Assumed(2, "GB/s", "one process writes to shared storage", "an assumption"),
    "cores": Assumed(14, "cores", "of the host per GPU (112 in a node of 8)", "NVIDIA DGX H100 data sheet"),
    "clip_kb": Assumed(250, "kB", "a stored clip: 2 s, short side 256, H.264 at 1 Mbit/s", "an assumption"),
    "mfu": Assumed(1, "", "MFU of the larger models over that of ViT-B, which was measured", "an assumption"),
}


def a(name: str) -> float:
    """The value of an assumption."""
    return ASSUMED[name].value


def result(name: str) -> Any:
    """A committed results file."""
    return json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))


@dataclass(frozen=True)
class Model:
    """Counted: parameters of encoder and predictor, and FLOP of a clip in a step."""

    name: str
    batch: int
    parallel: str
    encoder: int
    predictor: int
    flop: float

    @property
    def trained(self) -> int:
        """Parameters with a gradient."""
        return self.encoder + self.predictor


def count(name: str) -> Model:
    """A size of `SIZES` in the published recipe, with the masks that were counted for it, at batch 64."""
    model_name, batch, parallel = SIZES[name]
    cfg = config.load(RECIPE, [f"model.model_name={model_name}", "data.datasets=[]", "data.datasets_weights=null"])
    with torch.device("meta"):
        encoder, predictor, _ = build_models(cfg)
    tokens = math.prod(encoder.grid((1, 3, max(cfg.data.dataset_fpcs), cfg.data.crop_size, cfg.data.crop_size)))
    masks = [(r["context batch"], r["predicted batch"]) for r in result("mask_tokens") if r["batch"] == 64]
    clips = [flops.Clips(1, tokens, masks)]
    cost = flops.step_cost(flops.Dims.of(encoder, predictor), clips, predict_context=True, target_grad=False)
    own = [sum(p.numel() for p in m.parameters()) for m in (encoder, predictor)]
    return Model(name, batch, parallel, own[0], own[1], sum(c.flops for c in cost.values()))


def measured() -> tuple[float, float]:
    """(seconds of a clip in a step of ViT-B on an H100, processor seconds of reading a clip)."""
    step = next(r for r in result("h100/captured")["rows"] if r["batch"] == 64)
    reading = next(
        r
        for r in result("data")["rows"]
        if (r["what"], r["film"], r["threads"], r["decoder"]) == ("batches", "its converted copy", 1, "pyav")
    )
    return 1 / step["clips_per_s"], reading["cpu_ms"] / 1000


def travel(model: Model, gpus: int) -> tuple[float, float]:
    """(GB that the gradients, or under FSDP weights and gradients, of one GPU are; seconds that they take)."""
    if model.parallel == "ddp":
        sent, times = 4.0 * model.trained, 2  # float32, there and back
    else:  # bfloat16 weights forward and backward, of the target forward; float32 gradients: each one way
        sent, times = 2.0 * (2 * model.trained + model.encoder) + 4.0 * model.trained, 1
    wide = 1e9 * a("reached") * (a("nvlink") / 2 if gpus <= a("node") else a("node") * a("nic"))
    return sent / 1e9, times * (gpus - 1) / gpus * sent / wide


def held(model: Model, gpus: int) -> float:
    """GB of weights, gradients, two moments and target on a GPU, without activations."""
    whole = 4.0 * (4 * model.trained + model.encoder)
    return (whole + 2.0 * model.encoder if model.parallel == "ddp" else whole / gpus) / 1e9


def tables() -> str:
    """Both tables and the assumptions, in Markdown."""
    models, (clip_s, read_s) = [count(name) for name in SIZES], measured()
    base = models[0].flop
    lines = [
        "| model | parameters, encoder + predictor | TFLOP a clip | clips/s of a GPU | weights | state on a GPU of 8 |"
    ]
    lines += ["|---|---|---|---|---|---|"]
    for m in models:
        lines.append(
            f"| {m.name} | {m.encoder / 1e6:.0f} + {m.predictor / 1e6:.0f} M | {m.flop / 1e12:.2f} | "
            f"{a('mfu') * base / m.flop / clip_s:.0f} | {m.parallel} | {held(m, 8):.1f} GB |"
        )
    lines += [
        "",
        "| model | GPUs | step | sent a step | on the way | clips/s | a billion clips | reading, cores a GPU |",
    ]
    lines[-1] += " read | checkpoint | to write | failures a day | lost |"
    lines += ["|---|---|---|---|---|---|---|---|---|---|---|---|---|"]
    for m in models:
        for gpus in GPUS:
            step = m.batch * clip_s * m.flop / base / a("mfu")
            sent, way = travel(m, gpus)
            rate = gpus * m.batch / (step + way)  # nothing of it hidden
            saved = 4.0 * (3 * m.trained + m.encoder) / 1e9
            failures = 24 * gpus / a("mtbf")
            lost = failures * (a("save_every") / 2 + a("restart")) / 60 / 24 + saved / a("disk") / 60 / a("save_every")
            lines.append(
                f"| {m.name} | {gpus} | {1000 * step:.0f} ms | {sent:.2f} GB | {1000 * way:.1f} ms | {rate:,.0f} | "
                f"{CLIPS / rate / 86400 / (1 - lost):.1f} days | {rate / gpus * read_s:.1f} | "
                f"{rate * a('clip_kb') / 1e6:.2f} GB/s | {saved:.1f} GB | {saved / a('disk'):.0f} s | {failures:.3f} | "
                f"{100 * lost:.1f} % |"
            )
    lines += ["", f"A billion clips of {a('clip_kb'):.0f} kB are {CLIPS * a('clip_kb') / 1e9:.0f} TB."]
    lines += ["", "| assumed | value | source |", "|---|---|---|"]
    for x in ASSUMED.values():
        lines.append(f"| {x.what} | {x.value:,.6g} {x.unit} | {x.source} |".replace("  |", " |"))
    return "\n".join(lines) + "\n"


def page(text: str) -> str:
    """A page with the tables in their place."""
    before, rest = text.split(BEGIN)
    return before + BEGIN + tables() + END + rest.split(END)[1]


def main() -> int:
    """Compute, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--page", metavar="PATH", type=Path, help="write the tables into this page")
    args = parser.parse_args()
    print(tables())
    if args.page:
        write_text(args.page, page(args.page.read_text(encoding="utf-8")))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
