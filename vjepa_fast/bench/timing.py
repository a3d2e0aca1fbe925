"""How the benchmarks measure: by turns, medians, peak memory, rows of JSON and a table.

A row is a dict: op, shape, dtype, provider, mode (forward, backward, full, step), median_ms, min_ms, max_ms, repeats,
peak_bytes, floor_bytes (what the op cannot avoid moving; None where that is not the limit), gb_per_s (floor over
time), device, threads, torch, triton, python, commit.
"""

from __future__ import annotations

import ctypes
import gc
import importlib.metadata
import json
import platform
import statistics
import time
from collections.abc import Callable

import torch

from vjepa_fast.trainer.run_folder import device_name, git_commit

_MMAP_THRESHOLD = -3  # of mallopt


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


def times(fns: dict[str, Callable[[], object]], device: torch.device, repeats: int, budget_s: float) -> dict:
    """Milliseconds of every function, taken by turns so that a slow moment of the machine hits all.

    Args:
        repeats: rounds at most. budget_s: no new round of a function begins once its rounds have taken so long; slow
            functions thus have fewer, but at least three.
    """
    found: dict[str, list[float]] = {name: [] for name in fns}
    flush = torch.empty(64 << 20, dtype=torch.int32, device=device) if device.type == "cuda" else None
    for fn in fns.values():
        for _ in range(2):
            fn()
    hold = {name: _cycles_to_queue(fn) for name, fn in fns.items()} if flush is not None else {}
    for _ in range(repeats):
        for name, fn in fns.items():
            if len(found[name]) < 3 or sum(found[name]) < 1e3 * budget_s:
                found[name].append(_cuda_ms(fn, flush, hold[name]) if flush is not None else _cpu_ms(fn))
    return found


def _cpu_ms(fn) -> float:
    began = time.perf_counter()
    out = fn()
    ended = time.perf_counter()
    del out
    return 1e3 * (ended - began)


def _cycles_to_queue(fn) -> int:
    """Cycles of a GPU (2 a nanosecond) in which the host queues a whole call, twice over; a second at most."""
    torch.cuda.synchronize()
    began = time.perf_counter()
    fn()
    seconds = time.perf_counter() - began
    torch.cuda.synchronize()
    return int(min(2 * seconds, 1.0) * 2e9)


def _cuda_ms(fn, flush, hold: int) -> float:
    """Time of the device's work: it waits until the call is queued, else Python's pace would time short kernels."""
    flush.zero_()  # what the last call left in the L2 cache would flatter this one
    torch.cuda._sleep(hold)
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    fn()
    end.record()
    torch.cuda.synchronize()
    return begin.elapsed_time(end)


def peak_bytes(fn: Callable[[], object], device: torch.device) -> int | None:
    """Memory that a call takes at most, above what is in use before it; what it returns counts.

    On CUDA the allocator's. On Linux resident memory: the kernel's high-water mark is reset before the call, and malloc
    is told to give every tensor pages of its own, so that memory freed earlier does not hide what this call takes.
    None elsewhere.
    """
    fn()
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        fn()
        return torch.cuda.max_memory_allocated(device) - before
    if platform.system() != "Linux":
        return None
    libc = ctypes.CDLL(None)
    libc.mallopt(_MMAP_THRESHOLD, 1 << 16)
    fn()
    libc.malloc_trim(0)
    try:
        with open("/proc/self/clear_refs", "w", encoding="ascii") as f:
            f.write("5")
        before = _status("VmHWM")
        out = fn()
        peak = _status("VmHWM") - before
        del out
    except OSError:
        return None
    finally:
        libc.mallopt(_MMAP_THRESHOLD, 32 << 20)
    return peak


def _status(field: str) -> int:
    with open("/proc/self/status", encoding="ascii", errors="ignore") as f:
        return next(1024 * int(line.split()[1]) for line in f if line.startswith(field))


def copy_bandwidth(device: torch.device) -> float:
    """Bytes per second that a large copy moves (read and written), the median of several."""
    source = torch.empty(256 << 20 if device.type == "cuda" else 64 << 20, dtype=torch.int32, device=device)
    target = torch.empty_like(source)
    ms = statistics.median(times({"copy": lambda: target.copy_(source)}, device, 15, 5.0)["copy"])
    return 2 * source.numel() * source.element_size() / (ms / 1e3)


def row(ms: list[float], floor_bytes: int | None, **what) -> dict:
    """One row; ``what``: op, shape, dtype, provider, mode, peak_bytes and the fields of ``describe``."""
    median = statistics.median(ms)
    rate = None if floor_bytes is None else round(floor_bytes / median / 1e6, 2)
    return {
        **what,
        "median_ms": round(median, 4),
        "min_ms": round(min(ms), 4),
        "max_ms": round(max(ms), 4),
        "repeats": len(ms),
        "floor_bytes": floor_bytes,
        "gb_per_s": rate,
    }


def write_json(path: str, rows: list[dict]) -> None:
    with open(path, "w", encoding="utf-8") as f:
        f.write("[\n" + ",\n".join(json.dumps(r) for r in rows) + "\n]\n")


def table(rows: list[dict]) -> str:
    """Markdown: a line per op, shape, dtype and mode; milliseconds of each provider and how many times faster the last
    one is than each, peak memory of the first and the last.
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

        def ratio(name, ms=ms):
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
    return "\n".join(lines)
