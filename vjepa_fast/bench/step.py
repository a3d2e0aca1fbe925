"""The times of whole training steps, by provider and case: rows of JSON as ``vjepa-fast bench step`` writes them."""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence

import torch

from vjepa_fast.bench.memory import free, start_peak
from vjepa_fast.bench.providers import Provider
from vjepa_fast.bench.results import describe
from vjepa_fast.config import Config
from vjepa_fast.metrics import hardware, profile

_MEASURED = (
    "median_ms", "min_ms", "max_ms", "steps_per_s", "clips_per_s", "mfu", "gflop_per_clip",
    "first_loss", "peak_bytes", "peak_after_imports", "launches_per_step", "syncs_per_step",
)  # fmt: skip
TURN = {"cuda": 4, "cpu": 1}  # steps timed together: on CUDA without waiting for the device between them


def measure_cases(
    cases: Sequence[tuple[str, Config]],
    names: Sequence[str],
    warmup: int,
    repeats: int,
    *,
    deadline: float = float("inf"),
    memory: bool = True,
    on_rows: Callable[[list[dict]], None] = lambda rows: None,
) -> Iterator[list[dict]]:
    """Measure the providers ``names`` in every case (recipe, configuration); yields a case's rows when it is through.

    Of several cases on CUDA, what compiles comes last, since it takes minutes that may eat the time up to ``deadline``
    (of `time.monotonic`): a case then comes twice. ``on_rows`` gets all rows whenever there are new ones.
    """
    passes = [list(names)]
    if len(cases) > 1 and cases[0][1].runtime.device.startswith("cuda"):
        late = [name for name in names if name.endswith("_compiled")]
        passes = [part for part in ([name for name in names if name not in late], late) if part]
    found: list[list[dict]] = [[] for _ in cases]
    for part in passes:
        for (recipe, cfg), mine in zip(cases, found):
            for new in measure(cfg, part, warmup, repeats, deadline=deadline, memory=memory, against=mine):
                mine += [{"recipe": recipe, **row} for row in new]
                on_rows([row for rows in found for row in rows])
            yield mine


def measure(
    cfg: Config,
    names: Sequence[str],
    warmup: int,
    repeats: int,
    *,
    deadline: float = float("inf"),
    memory: bool = True,
    against: Sequence[dict] = (),
) -> Iterator[list[dict]]:
    """Time providers on the same weights, clips and masks; yields rows as they are ready.

    On a CPU all by turns, so that a slow moment hits all; on CUDA one after another, so that each has the memory for
    itself. One that fails gives a row with ``error``, the others go on. One whose first loss is not that of the first
    (of ``against``, rows that are there already, else of these) has an ``error`` and ``mismatch``: its time compares
    nothing.
    """
    cuda = cfg.runtime.device.startswith("cuda")
    known = ((r["provider"], r["first_loss"]) for r in against if r["first_loss"] is not None)
    first = next(known, None)  # (provider, loss) that all are held against
    for group in [[name] for name in names] if cuda else [list(names)]:
        if time.monotonic() > deadline:
            yield [_row(cfg, name, error="not begun: the time of --budget was over") for name in group]
            continue
        rows = _measure_together(cfg, group, warmup, repeats, deadline)
        for row in rows:
            loss = row["first_loss"]
            if first is None and loss is not None:
                first = row["provider"], loss
            tolerance = 1e-4 if cfg.runtime.dtype == "float32" else 2e-2
            if loss is not None and first is not None and not abs(loss - first[1]) <= tolerance * abs(first[1]):
                row["mismatch"] = True
                row["error"] = f"loss {loss:.6g} at step 1 where {first[0]} has {first[1]:.6g}: not comparable"
            if memory and not cuda and row["error"] is None and time.monotonic() < deadline:
                row.update(peak_memory(cfg, row["provider"]))
        yield rows


def _measure_together(cfg: Config, names: Sequence[str], warmup: int, repeats: int, deadline: float) -> list[dict]:
    providers: dict[str, Provider] = {}
    rows = {name: _row(cfg, name) for name in names}
    times: dict[str, list[float]] = {name: [] for name in names}
    flops: dict[str, list[float]] = {name: [] for name in names}
    imported: dict[str, int] = {}  # bytes in use on the GPU before a provider was built
    built: dict[str, int] = {}  # and after

    def attempt(name: str, work: Callable[[], None]) -> None:
        try:
            work()
        except Exception as error:  # out of memory, a compiler that gives up: its row says so
            text = str(error).strip().splitlines()
            rows[name]["error"] = f"{type(error).__name__}: {text[0] if text else ''}"[:300]
        if rows[name]["error"]:  # the error is gone, and with it the frames that held memory
            providers.pop(name, None)
            free()

    def build(name: str) -> None:
        imported[name] = start_peak(cfg.runtime.device)
        providers[name] = p = Provider(name, cfg)
        built[name] = start_peak(cfg.runtime.device)
        rows[name].update(about(cfg, p))

    def turn(name: str, number: int) -> None:
        p = providers[name]
        timed = number >= warmup
        if number == warmup:
            start_peak(cfg.runtime.device)  # what compilation and first calls took does not count
        size = TURN[p.device.type] if timed else 1
        start = number if not timed else warmup + (number - warmup) * size
        prepared = [p.prepare(index) for index in range(start, start + size)]
        _wait(p.device)
        began = time.perf_counter()
        loss = p.steps(prepared, start)
        _wait(p.device)
        seconds = (time.perf_counter() - began) / size
        if timed:
            times[name].append(seconds)
            flops[name].append(sum(map(p.flops, prepared)) / size)
        if number == 0:
            rows[name]["first_loss"] = float(loss)

    for name in names:
        attempt(name, lambda name=name: build(name))
    for number in range(warmup + repeats):
        if number > warmup and time.monotonic() > deadline:
            break
        for name in list(providers):
            attempt(name, lambda name=name, number=number: turn(name, number))
    for name, p in list(providers.items()):
        row = rows[name]
        row.update(_speed(cfg, p, statistics.median(times[name]), statistics.median(flops[name])))
        row.update(
            min_ms=round(1e3 * min(times[name]), 3), max_ms=round(1e3 * max(times[name]), 3), repeats=len(times[name])
        )
        if p.device.type == "cuda":
            most = torch.cuda.max_memory_allocated(p.device)
            row.update(peak_bytes=most - built[name], peak_after_imports=most - imported[name])
        attempt(name, lambda name=name, p=p: rows[name].update(counts(p)))
    providers.clear()
    free()
    if "torch._dynamo" in sys.modules:  # else the next case's models count against the limit of recompilations
        torch._dynamo.reset()
    return list(rows.values())


def _row(cfg: Config, name: str, error: str | None = None) -> dict:
    """A row with nothing measured yet."""
    return {
        "op": "train_step",
        "provider": name,
        "mode": "step",
        "batch": cfg.data.batch_size,
        "dtype": cfg.runtime.dtype,
        **dict.fromkeys(_MEASURED),
        "error": error,
        "mismatch": False,
    }


def _speed(cfg: Config, provider: Provider, seconds: float, flops: float) -> dict:
    peak = hardware.peak(provider.device, provider.dtype, cfg.runtime.peak_tflops)
    clips = cfg.data.batch_size
    return {
        "median_ms": round(1e3 * seconds, 3),
        "steps_per_s": round(1 / seconds, 4),
        "clips_per_s": round(clips / seconds, 3),
        "gflop_per_clip": round(flops / clips / 1e9, 2),
        "mfu": round(flops / seconds / peak.flops, 4) if peak.flops else None,
        "peak_flops": peak.label,
    }


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def counts(provider: Provider) -> dict:
    """Kernel launches (on a CPU: calls of operators) and host syncs (on a CPU: None) per step.

    On CUDA of steps in the middle of some: the batch of the first was not made ready meanwhile, the last has no next
    one.
    """
    edge = 1 if provider.device.type == "cuda" else 0
    prepared = [provider.prepare(1000 + i) for i in range(1 + 3 * edge)]

    def mark(i: int) -> contextlib.AbstractContextManager:
        inner = edge <= i < len(prepared) - edge
        return torch.profiler.record_function("bench/step") if inner else contextlib.nullcontext()

    _wait(provider.device)
    with profile.profiler(provider.device) as found:
        provider.steps(prepared, 1000, mark)
        _wait(provider.device)
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "trace.json")
        found.export_chrome_trace(path)
        with open(path, encoding="utf-8") as f:
            report = profile.analyse(json.load(f), within="bench/step")
    return {"launches_per_step": report.launches, "syncs_per_step": report.syncs}


def about(cfg: Config, provider: Provider) -> dict:
    """What was measured and where."""
    d = cfg.data
    where = describe(provider.device)
    return {
        "op": "train_step",
        "shape": f"{cfg.model.model_name} B{d.batch_size} F{'/'.join(map(str, dict.fromkeys(d.dataset_fpcs)))} "
        f"{d.crop_size}px p{d.patch_size} {'+'.join(cfg.objectives)}",
        "dtype": cfg.runtime.dtype,
        "provider": provider.name,
        **{k: v for k, v in where.items() if k != "triton"},
    }


def peak_memory(cfg: Config, name: str) -> dict:
    """Peak resident memory of two steps in a fresh process: bytes above what the built models take (``peak_bytes``) and
    above what importing takes (``peak_after_imports``); None where the system does not report them.
    """
    if hardware.resident("VmRSS") is None:
        return {"peak_bytes": None, "peak_after_imports": None}
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(_peak_memory, (cfg, name))


def _peak_memory(cfg: Config, name: str) -> dict:
    import torch._dynamo  # noqa: F401  (torch imports it at the first optimiser step: no part of the step)

    imported = hardware.resident("VmRSS")
    provider = Provider(name, cfg)
    built = hardware.resident("VmRSS")
    for index in range(2):
        float(provider.step(provider.prepare(index), index))
    most = hardware.resident("VmHWM")
    assert imported is not None and built is not None and most is not None
    return {"peak_bytes": most - built, "peak_after_imports": most - imported}
