"""Rows of measurements: where they were taken, the JSON file, and the table of the op benchmarks.

A row is a dict: op, shape, dtype, provider, mode (forward, backward, full, step), median_ms, min_ms, max_ms, repeats,
peak_bytes, floor_bytes (what the op cannot avoid moving; None where that is not the limit), gb_per_s (floor over
time), device, threads, torch, triton, python, commit, and error: None, or why there is no time.
"""

from __future__ import annotations

import importlib.metadata
import json
import platform
import statistics
from collections.abc import Sequence
from pathlib import Path

import torch

from vjepa_fast.files import write_text
from vjepa_fast.trainer.run_folder import device_name, git_commit


def describe(device: torch.device) -> dict:
    """Where the figures were taken."""
    try:
        triton = importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        triton = None
    return {
        "device": device_name(device),
        "threads": torch.get_num_threads(),
        "torch": str(torch.__version__),
        "triton": triton,
        "python": platform.python_version(),
        "commit": git_commit(),
    }


def row(ms: Sequence[float], floor_bytes: int | None, *, error: str | None = None, **what: object) -> dict:
    """One row; ``what``: op, shape, dtype, provider, mode, peak_bytes and the fields of ``describe``.

    ``error``: why nothing was measured; ``ms`` is empty then, and so are the fields made of it.
    """
    median = statistics.median(ms) if ms else None
    return {
        **what,
        "median_ms": None if median is None else round(median, 4),
        "min_ms": round(min(ms), 4) if ms else None,
        "max_ms": round(max(ms), 4) if ms else None,
        "repeats": len(ms),
        "floor_bytes": floor_bytes,
        "gb_per_s": None if floor_bytes is None or median is None else round(floor_bytes / median / 1e6, 2),
        "error": error,
    }


def write(path: str | Path, rows: Sequence[dict]) -> None:
    """Write the rows as JSON, a line each."""
    write_text(path, "[\n" + ",\n".join(json.dumps(r) for r in rows) + "\n]\n")


def table(rows: Sequence[dict]) -> str:
    """Markdown: a line per op, shape, dtype and mode; milliseconds of each provider and how many times faster the last
    one is than each, peak memory of the first and the last. Errors follow, a line each.
    """
    order = ["reference", "eager", "compiled", "fused"]
    groups: dict[tuple, dict[str, dict]] = {}
    for r in rows:
        groups.setdefault((r["op"], r["shape"], r["dtype"], r["mode"]), {})[r["provider"]] = r
    lines = [
        "| op | shape | mode | reference ms | eager ms | compiled ms | fused ms | x reference | x compiled | "
        "GB/s | peak MB |",
        "|---|---|---|--:|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for (op, shape, dtype, mode), by in groups.items():
        ms = {name: by[name]["median_ms"] if name in by else None for name in order}
        fused, peaks = by.get("fused"), [by[n]["peak_bytes"] for n in ("reference", "fused") if n in by]

        def ratio(name: str, ms: dict = ms) -> str:
            return "-" if None in (ms[name], ms["fused"]) else f"{ms[name] / ms['fused']:.1f}"

        rate = "-" if not fused or fused["gb_per_s"] is None else f"{fused['gb_per_s']:.1f}"
        memory = " -> ".join("-" if p is None else f"{p / 1e6:.0f}" for p in peaks)
        cells = [
            op,
            f"{shape} {dtype}",
            mode,
            *("-" if ms[n] is None else f"{ms[n]:.3g}" for n in order),
            ratio("reference"),
            ratio("compiled"),
            rate,
            memory,
        ]
        lines.append("| " + " | ".join(cells) + " |")
    errors = [f"{r['op']} {r['mode']}, {r['provider']}: {r['error']}" for r in rows if r.get("error")]
    return "\n".join([*lines, *([""] if errors else []), *errors])
