"""The time of functions, taken by turns, on a CPU or on the device's own clock; and what a large copy reaches."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping

import torch


def times(
    fns: Mapping[str, Callable[[], object]], device: torch.device, repeats: int, budget_s: float
) -> dict[str, list[float]]:
    """Milliseconds of every function, taken by turns so that a slow moment of the machine hits all.

    ``repeats``: rounds at most; no new round of a function begins once its rounds have taken ``budget_s``, so that slow
    functions have fewer, but at least three.
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


def _cpu_ms(fn: Callable[[], object]) -> float:
    began = time.perf_counter()
    out = fn()
    ended = time.perf_counter()
    del out
    return 1e3 * (ended - began)


def _cycles_to_queue(fn: Callable[[], object]) -> int:
    """Cycles of a GPU (2 a nanosecond) in which the host queues a whole call, twice over; a second at most."""
    torch.cuda.synchronize()
    began = time.perf_counter()
    fn()
    seconds = time.perf_counter() - began
    torch.cuda.synchronize()
    return int(min(2 * seconds, 1.0) * 2e9)


def _cuda_ms(fn: Callable[[], object], flush: torch.Tensor, hold: int) -> float:
    """Time of the device's work: it waits until the call is queued, else Python's pace would time short kernels."""
    flush.zero_()  # what the last call left in the L2 cache would flatter this one
    torch.cuda._sleep(hold)
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    fn()
    end.record()
    torch.cuda.synchronize()
    return begin.elapsed_time(end)


def copy_bandwidth(device: torch.device) -> float:
    """Bytes per second that a large copy moves (read and written), the median of several."""
    source = torch.empty(256 << 20 if device.type == "cuda" else 64 << 20, dtype=torch.int32, device=device)
    target = torch.empty_like(source)
    ms = statistics.median(times({"copy": lambda: target.copy_(source)}, device, 15, 5.0)["copy"])
    return 2 * source.numel() * source.element_size() / (ms / 1e3)
