"""Steps of 1, 2 and 4 processes on this machine over gloo, and how much of the all-reduce the backward pass hides.

    python benchmarks/bench_scaling.py                                             # prints
    python benchmarks/bench_scaling.py --json benchmarks/results/scaling.json      # and records
    python benchmarks/bench_scaling.py --page docs/scaling.md                      # the recorded ones as a table

The global batch is the same for every number of processes, so the work is; they share the cores of the machine, and
more of them than cores cannot be faster. What the table is for: that losses agree, that gradients travel while the
backward pass runs, and what a process holds under DDP and under FSDP. Overlap is read from a trace of torch's profiler
(first process, one step): of the time in which a collective of the gradients was under way, the share in which an
operator of the backward pass ran; and the collectives of which that is more than half.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from vjepa_fast.config import schema
from vjepa_fast.data.loader import Batch, ClipGroup
from vjepa_fast.files import write_json, write_text
from vjepa_fast.models.parts import local
from vjepa_fast.trainer.distributed import Distributed
from vjepa_fast.trainer.step import TrainStep

RESULTS = Path(__file__).parent / "results" / "scaling.json"
BEGIN, END = "<!-- scaling bench -->\n", "<!-- end of scaling bench -->"
BATCH, SIDE, FRAMES, GLOBAL = 1, 48, 8, 4
COLLECTIVES = ("gloo:all_reduce", "gloo:reduce_scatter", "gloo:_reduce_scatter_base", "nccl:all_reduce")
COMPUTES = ("aten::", "vjepa_fast", "mkldnn::")  # operators; what sends or waits is c10d::
SIZES = {  # embed_dim, depth, num_heads of the encoder and of the predictor
    "small": ((192, 4, 3), (96, 2, 3)),
    "large": ((384, 12, 6), (192, 4, 6)),
}
WAYS = (
    ("small", 1, "ddp"), ("small", 2, "ddp"), ("small", 4, "ddp"), ("small", 2, "fsdp"), ("small", 4, "fsdp"),
    ("large", 1, "ddp"), ("large", 2, "ddp"), ("large", 2, "fsdp"),
)  # fmt: skip
Span = tuple[float, float]


def configuration(world: int, parallel: str, size: str) -> schema.Config:
    """A small ViT, or one whose gradients fill several of DDP's buckets."""
    (width, depth, heads), (pred_width, pred_depth, pred_heads) = SIZES[size]
    return schema.Config(
        data=schema.DataConfig(dataset_fpcs=(FRAMES,), batch_size=BATCH, crop_size=SIDE, patch_size=8),
        masks=schema.MasksConfig(specs=(schema.MaskConfig(num_blocks=2, spatial_scale=(0.3, 0.3)),)),
        model=schema.ModelConfig(
            embed_dim=width,
            depth=depth,
            num_heads=heads,
            pred_embed_dim=pred_width,
            pred_depth=pred_depth,
            pred_num_heads=pred_heads,
            levels=2,
        ),
        objectives={"pred": {}, "context": {"warmup": [0, 0]}},
        optimization=schema.OptimizationConfig(epochs=2, ipe=10, accumulate=GLOBAL // world // BATCH),
        runtime=schema.RuntimeConfig(device="cpu", dtype="float32", parallel=parallel, threads=1),
    )


def batches(cfg: schema.Config, index: int, rank: int, world: int) -> list[Batch]:
    """Micro-batches of noise, a function of the global sample alone."""
    found: list[Batch] = []
    for part in range(cfg.optimization.accumulate):
        first = (index * cfg.optimization.accumulate + part) * world * BATCH + rank * BATCH
        clips = [torch.Generator().manual_seed(first + b) for b in range(BATCH)]
        clip = torch.stack(
            [torch.randint(0, 256, (3, FRAMES, SIDE, SIDE), dtype=torch.uint8, generator=g) for g in clips]
        )
        zeros = torch.zeros(BATCH, dtype=torch.int64)
        found.append(Batch([ClipGroup(clip, zeros, zeros, [str(first)], FRAMES, "video", first)], index))
    return found


def union(spans: list[Span]) -> list[Span]:
    """The same time as spans that do not touch."""
    out: list[Span] = []
    for start, end in sorted(spans):
        if out and start <= out[-1][1]:
            out[-1] = out[-1][0], max(end, out[-1][1])
        else:
            out.append((start, end))
    return out


def common(a: list[Span], b: list[Span]) -> float:
    """Time in both."""
    return sum(max(0.0, min(x[1], y[1]) - max(x[0], y[0])) for x in union(a) for y in union(b))


def overlap(trace: dict[str, Any]) -> dict[str, float]:
    """Of a trace of one step (microseconds): what its collectives of gradients and its backward pass have in common."""
    events = [e for e in trace["traceEvents"] if e.get("ph") == "X"]
    span = {id(e): (float(e["ts"]), float(e["ts"]) + float(e["dur"])) for e in events}
    passes = [e for e in events if e["name"] == "step/backward"]
    inside = [(e, p) for e in events for p in passes if span[id(p)][0] <= span[id(e)][0] < span[id(p)][1]]
    sent = [span[id(e)] for e, _ in inside if e["name"] in COLLECTIVES]
    computed = union([span[id(e)] for e, p in inside if e["tid"] == p["tid"] and e["name"].startswith(COMPUTES)])
    total = sum(t - s for s, t in union(sent))
    return {
        "collectives": len(sent),
        "collective_ms": round(total / 1000, 3),
        "hidden": round(common(sent, computed) / total, 4) if sent else 0.0,
        "mostly_hidden": sum(common([(s, t)], computed) > (t - s) / 2 for s, t in sent),
    }


def work(world: int, parallel: str, size: str, steps: int, out: str) -> None:
    """One process: time steps, profile one, and write what was found."""
    torch.set_num_threads(1)
    cfg = configuration(world, parallel, size)
    group = Distributed.from_env("cpu") if world > 1 else Distributed()
    step = TrainStep(cfg, world=group)
    losses, times = list[float](), list[float]()
    for index in range(steps):
        micro = batches(cfg, index, group.rank, world)
        began = time.perf_counter()
        made = step(micro, index)
        times.append(time.perf_counter() - began)
        losses.append(float(group.mean(made.loss.clone())))
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
        step(batches(cfg, steps, group.rank, world), steps)
    with tempfile.TemporaryDirectory() as folder:
        profiler.export_chrome_trace(str(Path(folder) / "trace.json"))
        found = overlap(json.loads((Path(folder) / "trace.json").read_text()))
    state = [x for s in step.optimizer.state.values() for x in s.values() if x.numel() > 1]
    held = [*step.params, *step.target_encoder.parameters(), *state]
    row = {
        "size": size,
        "parameters_m": round(sum(p.numel() for p in step.params) / 1e6, 1),
        "processes": world,
        "parallel": parallel if world > 1 else "one process",
        "accumulate": cfg.optimization.accumulate,
        "ms": round(1000 * statistics.median(times[1:]), 1),
        "held_mb": round(sum(local(x).numel() * x.element_size() for x in held) / 1e6, 2),
        "losses": losses,
        **found,
    }
    if group.main:
        write_json(out, row)
    group.close()


def launched(size: str, world: int, parallel: str, steps: int, folder: Path) -> dict[str, Any]:
    """The row of one way to run."""
    out = folder / f"{size}{parallel}{world}.json"
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    env = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(world)}
    command = [sys.executable, __file__, "--work", str(out), "--size", size]
    command += ["--parallel", parallel, "--steps", str(steps)]
    ranks = [
        subprocess.Popen(command, env={**os.environ, **env, "RANK": str(r), "LOCAL_RANK": str(r)}) for r in range(world)
    ]
    codes = [p.wait() for p in ranks]
    if any(codes):
        raise RuntimeError(f"{parallel} of {world}: exit codes {codes}")
    return json.loads(out.read_text())


def table(found: dict[str, Any]) -> str:
    """Recorded results in Markdown."""
    lines = [
        "| parameters | weights | processes | micro-batches | ms a step | collectives | hidden | mostly | held | "
        "loss differs by |"
    ]
    lines += ["|---|---|---|---|---|---|---|---|---|---|"]
    for r in found["rows"]:
        sent = [str(r["collectives"]), f"{100 * r['hidden']:.0f} %", str(r["mostly_hidden"])]
        sent = sent if r["processes"] > 1 else ["-"] * 3
        cells = [f"{r['parameters_m']:.1f} M", r["parallel"], str(r["processes"]), str(r["accumulate"])]
        cells += [f"{r['ms']:.0f}", *sent]
        lines.append("| " + " | ".join([*cells, f"{r['held_mb']:.1f} MB", f"{r['largest_difference']:.1e}"]) + " |")
    machine = f"{found['cores']} cores, load {found['load_before']} before"
    lines += ["", f"Medians of {found['steps'] - 1} steps; {machine}; torch {found['torch']}."]
    return "\n".join(lines) + "\n"


def page(text: str, found: dict[str, Any]) -> str:
    """A page with the table in its place."""
    before, rest = text.split(BEGIN)
    return before + BEGIN + table(found) + END + rest.split(END)[1]


def main() -> int:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", metavar="PATH", help="also write it here")
    parser.add_argument("--steps", type=int, default=8, help="steps of a run (default %(default)s)")
    parser.add_argument("--work", help=argparse.SUPPRESS)
    parser.add_argument("--parallel", default="ddp", help=argparse.SUPPRESS)
    parser.add_argument("--size", default="small", help=argparse.SUPPRESS)
    parser.add_argument("--page", metavar="PATH", type=Path, help="write the recorded results into this page")
    args = parser.parse_args()
    if args.page:
        found = json.loads(RESULTS.read_text(encoding="utf-8"))
        write_text(args.page, page(args.page.read_text(encoding="utf-8"), found))
        return 0
    if args.work:
        work(int(os.environ["WORLD_SIZE"]), args.parallel, args.size, args.steps, args.work)
        return 0
    load, rows = os.getloadavg()[0], list[dict[str, Any]]()
    with tempfile.TemporaryDirectory() as folder:
        for size, world, parallel in WAYS:
            rows.append(launched(size, world, parallel, args.steps, Path(folder)))
            print({k: v for k, v in rows[-1].items() if k != "losses"}, flush=True)
    alone = {row["size"]: row["losses"] for row in rows if row["processes"] == 1}
    for row in rows:
        row["largest_difference"] = max(abs(a - b) / a for a, b in zip(alone[row["size"]], row.pop("losses")))
    found = {
        "command": "python benchmarks/bench_scaling.py",
        "steps": args.steps,
        "global_batch": GLOBAL,
        "cores": os.cpu_count(),
        "load_before": round(load, 1),
        "torch": torch.__version__,
        "rows": rows,
    }
    print(*(f"{r['size']} {r['parallel']} {r['processes']}: {r['largest_difference']:.1e}" for r in rows), sep="\n")
    if args.json:
        write_json(args.json, found)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
