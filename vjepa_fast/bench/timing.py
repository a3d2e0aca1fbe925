"""The time of functions, taken by turns, by the wall or on the device's own clock; and what a large copy reaches."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Collection, Mapping

import torch

from vjepa_fast.bench.errors import error_text


def times(
    fns: Mapping[str, Callable[[], object]],
    device: torch.device,
    repeats: int,
    budget_s: float,
    *,
    host: Collection[str] = (),
    failed: dict[str, str] | None = None,
) -> dict[str, list[float]]:
    """Milliseconds of every function, taken by turns so that a slow moment of the machine hits all.

    Args:
        fns: name -> function.
        device: whose clock is read: events on CUDA, elsewhere the wall clock.
        repeats: rounds at most; no new round of a function begins once its rounds have taken ``budget_s``, so that slow
            functions have fewer, but at least three.
        host: names of functions that work on the CPU. Events on a GPU see nothing of them, so they are timed by the
            wall clock, from an idle device to an idle device.
        failed: gets the error of each function that raises; it has no times and the others go on. None: it is raised.
    """
    found: dict[str, list[float]] = {name: [] for name in fns}
    flush = torch.empty(64 << 20, dtype=torch.int32, device=device) if device.type == "cuda" else None
    clocks: dict[str, Callable[[], float]] = {}

    def attempt(name: str, work: Callable[[], None]) -> None:
        try:
            work()
        except Exception as error:
            if failed is None:
                raise
            failed[name] = error_text(error)
            del found[name]

    for name, fn in fns.items():

        def ready(name: str = name, fn: Callable[[], object] = fn) -> None:
            clocks[name] = _clock(fn, device, None if name in host else flush)

        attempt(name, ready)
    for _ in range(repeats):
        for name in list(found):
            if len(found[name]) < 3 or sum(found[name]) < 1e3 * budget_s:
                attempt(name, lambda name=name: found[name].append(clocks[name]()))
    return found


def _clock(fn: Callable[[], object], device: torch.device, flush: torch.Tensor | None) -> Callable[[], float]:
    """What takes the time of ``fn``, which has been called twice; by events on the device where ``flush`` is given."""
    for _ in range(2):
        fn()
    if flush is None:
        return lambda: _wall_ms(fn, device)
    hold = _cycles_to_queue(fn)
    return lambda: _cuda_ms(fn, flush, hold)


def _wall_ms(fn: Callable[[], object], device: torch.device) -> float:
    wait = torch.cuda.synchronize if device.type == "cuda" else _nothing
    wait()
    began = time.perf_counter()
    out = fn()
    wait()
    ended = time.perf_counter()
    del out
    return 1e3 * (ended - began)


def _nothing() -> None:
    pass


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
