"""The times of whole training steps, by provider and case: rows of JSON as ``vjepa-fast bench step`` writes them."""

from __future__ import annotations

import contextlib
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence

import torch

from vjepa_fast.bench import trace
from vjepa_fast.bench.batches import Batches
from vjepa_fast.bench.cases import LIMITED, PUBLIC, Case
from vjepa_fast.bench.errors import error_text
from vjepa_fast.bench.memory import free, start_peak
from vjepa_fast.bench.process import TimeLimitError, isolated
from vjepa_fast.bench.providers import Provider
from vjepa_fast.bench.results import describe
from vjepa_fast.config import Config
from vjepa_fast.metrics import hardware, profile

_MEASURED = (
    "median_ms",
    "min_ms",
    "max_ms",
    "steps_per_s",
    "clips_per_s",
    "mfu",
    "gflop_per_clip",
    "first_loss",
    "peak_bytes",
    "peak_after_imports",
    "launches_per_step",
    "syncs_per_step",
    "host_ms",
    "device_ms",
    "device_busy",
    "plan_builds_per_step",
    "plan_ms",
    "known_shapes",
    "replayed",
    "settled_after",
)
TURN = {"cuda": 4, "cpu": 1}  # steps timed together: on CUDA without waiting for the device between them
SETTLED, MOST_TO_SETTLE = 16, 200  # replays in a row after which captured steps are timed; steps until then at most


def measure_cases(
    cases: Sequence[Case],
    names: Sequence[str],
    warmup: int,
    repeats: int,
    *,
    shapes: str = "new",
    deadline: float = float("inf"),
    limit_s: float = float("inf"),
    memory: bool = True,
    on_rows: Callable[[list[dict]], None] = lambda rows: None,
) -> Iterator[list[dict]]:
    """Measure the providers ``names`` in every case; yields a case's rows when it is through.

    Of several cases on CUDA, what compiles comes last, since it takes minutes that may eat the time up to ``deadline``
    (of `time.monotonic`): a case then comes twice. ``on_rows`` gets all rows whenever there are new ones. What others
    have reported of a case has rows too, of the provider ``public`` and with their ``source``.
    """
    passes = [list(names)]
    if len(cases) > 1 and cases[0].cfg.runtime.device.startswith("cuda"):
        late = [name for name in names if name.endswith("_compiled")]
        passes = [part for part in ([name for name in names if name not in late], late) if part]
    found: list[list[dict]] = [_reported(case) for case in cases]

    def known() -> list[dict]:
        return [row for rows in found for row in rows]

    for part in passes:
        for case, mine in zip(cases, found):
            for new in measure(
                case.cfg,
                part,
                warmup,
                repeats,
                shapes=shapes,
                deadline=deadline,
                limit_s=limit_s,
                memory=memory,
                against=mine,
            ):
                mine += [{"recipe": case.recipe, "case": case.public, **row} for row in new]
                on_rows(known())
            yield mine


def _reported(case: Case) -> list[dict]:
    """Rows of what others have reported of this case."""
    if case.public is None:
        return []
    public, clips = PUBLIC[case.public], case.cfg.data.batch_size
    return [
        {
            "recipe": case.recipe,
            "case": case.public,
            **_row(case.cfg, "public", None),
            "device": figure.device,
            "clips_per_s": figure.clips_per_s,
            "steps_per_s": round(figure.clips_per_s / clips, 4),
            "median_ms": round(1e3 * clips / figure.clips_per_s, 3),
            "source": public.source,
        }
        for figure in public.figures
    ]


def measure(
    cfg: Config,
    names: Sequence[str],
    warmup: int,
    repeats: int,
    *,
    shapes: str = "new",
    deadline: float = float("inf"),
    limit_s: float = float("inf"),
    memory: bool = True,
    against: Sequence[dict] = (),
) -> Iterator[list[dict]]:
    """Measure providers on the same weights, clips and masks (`cases.SHAPES`); yields rows as they are ready.

    On a CPU all by turns, so that a slow moment hits all; on CUDA one after another, so that each has the memory for
    itself. Those of `cases.LIMITED` come last, each in a process that is ended after ``limit_s`` seconds. One that
    fails gives a row with ``error``, the others go on. One whose first loss is not that of the first (of ``against``,
    rows that are there already, else of these) has an ``error`` and ``mismatch``: its time compares nothing.
    """
    cuda = cfg.runtime.device.startswith("cuda")
    known = ((r["provider"], r["first_loss"]) for r in against if r["first_loss"] is not None)
    first = next(known, None)  # (provider, loss) that all are held against
    together = [name for name in names if name not in LIMITED]
    groups = [[name] for name in together] if cuda else [together]
    for group in filter(None, [*groups, *([name] for name in names if name in LIMITED)]):
        began = time.monotonic()
        if began > deadline:
            yield [_row(cfg, name, shapes, "not begun: the time of --budget was over") for name in group]
            continue
        limited = group[0] in LIMITED
        if limited:
            rows = _measure_apart(cfg, group[0], warmup, repeats, shapes, deadline, limit_s)
        else:
            rows = _measure_together(cfg, group, warmup, repeats, shapes, deadline)
        for row in rows:
            loss = row["first_loss"]
            if first is None and loss is not None:
                first = row["provider"], loss
            tolerance = 1e-4 if cfg.runtime.dtype == "float32" else 2e-2
            if loss is not None and first is not None and not abs(loss - first[1]) <= tolerance * abs(first[1]):
                row["mismatch"] = True
                row["error"] = f"loss {loss:.6g} at step 1 where {first[0]} has {first[1]:.6g}: not comparable"
            if memory and not cuda and row["error"] is None and time.monotonic() < deadline:
                left = limit_s - (time.monotonic() - began) if limited else float("inf")
                with contextlib.suppress(TimeLimitError):  # the times are there; the memory stays unknown
                    row.update(peak_memory(cfg, row["provider"], left))
        yield rows


def _measure_apart(
    cfg: Config, name: str, warmup: int, repeats: int, shapes: str, deadline: float, limit_s: float
) -> list[dict]:
    """`_measure_together` of one, in a process that is ended after ``limit_s`` seconds or at ``deadline``."""
    left = deadline - time.monotonic()
    try:
        return isolated(_measure_together, (cfg, [name], warmup, repeats, shapes, deadline), min(limit_s, left))
    except TimeLimitError as error:
        text = f"time limit: {error}, {'--limit-s' if limit_s < left else 'the end of --budget'}"
    except RuntimeError as error:
        text = str(error)
    return [_row(cfg, name, shapes, text)]


def _measure_together(
    cfg: Config, names: Sequence[str], warmup: int, repeats: int, shapes: str, deadline: float
) -> list[dict]:
    providers: dict[str, Provider] = {}
    batches: dict[str, Batches] = {}
    rows = {name: _row(cfg, name, shapes) for name in names}
    times: dict[str, list[float]] = {name: [] for name in names}
    host: dict[str, list[float]] = {name: [] for name in names}  # until the host had launched the steps
    flops: dict[str, list[float]] = {name: [] for name in names}
    replayed: dict[str, list[int]] = {name: [] for name in names}  # of each turn the replays, the steps
    imported: dict[str, int] = {}  # bytes in use on the GPU before a provider was built
    built: dict[str, int] = {}  # and after
    turn_size = TURN[torch.device(cfg.runtime.device).type]
    if shapes == "repeated":
        warmup = max(warmup, turn_size)  # all shapes are seen before the clock runs

    def attempt(name: str, work: Callable[[], None]) -> None:
        try:
            work()
        except Exception as error:  # out of memory, a compiler that gives up: its row says so
            rows[name]["error"] = error_text(error)
        if rows[name]["error"]:  # the error is gone, and with it the frames that held memory
            providers.pop(name, None)
            batches.pop(name, None)
            free()

    def build(name: str) -> None:
        imported[name] = start_peak(cfg.runtime.device)
        providers[name] = p = Provider(name, cfg)
        built[name] = start_peak(cfg.runtime.device)
        rows[name].update(about(cfg, p))
        batches[name] = Batches(p, shapes, turn_size)

    def turn(name: str, number: int) -> None:
        p = providers[name]
        timed = number >= warmup
        if number == warmup:
            rows[name]["settled_after"] = settle(p, batches[name], warmup, deadline)
            start_peak(cfg.runtime.device)  # what compilation and first calls took does not count
        taken = batches[name].take(turn_size if timed else 1)
        prepared, indices = [ready.prepared for ready in taken], [ready.index for ready in taken]
        before = p.replays
        _wait(p.device)
        began = time.perf_counter()
        loss = p.steps(prepared, indices)
        launched = time.perf_counter()
        _wait(p.device)
        seconds = (time.perf_counter() - began) / len(taken)
        if timed:
            times[name].append(seconds)
            host[name].append((launched - began) / len(taken))
            flops[name].append(statistics.mean(ready.work.flops for ready in taken))
            if before is not None and p.replays is not None:
                replayed[name] += [p.replays - before, len(taken)]
            rows[name]["known_shapes"] = (rows[name]["known_shapes"] or 0) + sum(ready.known for ready in taken)
        if number == 0:
            rows[name]["first_loss"] = float(loss)

    def finish(name: str) -> None:
        p, row = providers[name], rows[name]
        row.update(_speed(cfg, p, statistics.median(times[name]), statistics.median(flops[name])))
        row.update(
            min_ms=round(1e3 * min(times[name]), 3), max_ms=round(1e3 * max(times[name]), 3), repeats=len(times[name])
        )
        if p.device.type == "cuda":
            most = torch.cuda.max_memory_allocated(p.device)
            row.update(peak_bytes=most - built[name], peak_after_imports=most - imported[name])
            row["host_ms"] = round(1e3 * statistics.median(host[name]), 3)
        row.update(counts(p, batches[name]))
        if replayed[name]:
            row["replayed"] = round(sum(replayed[name][::2]) / sum(replayed[name][1::2]), 4)
        if row["device_ms"] is not None:  # of the time without the profiler, which slows the host and not the device
            row["device_busy"] = round(min(1.0, row["device_ms"] / row["median_ms"]), 4)

    for name in names:
        attempt(name, lambda name=name: build(name))
    for number in range(warmup + repeats):
        if number > warmup and time.monotonic() > deadline:
            break
        for name in list(providers):
            attempt(name, lambda name=name, number=number: turn(name, number))
    for name in list(providers):
        attempt(name, lambda name=name: finish(name))
    providers.clear()
    batches.clear()
    free()
    if "torch._dynamo" in sys.modules:  # else the next case's models count against the limit of recompilations
        torch._dynamo.reset()
    return list(rows.values())


def settle(provider: Provider, batches: Batches, made: int, deadline: float) -> int | None:
    """More steps, one at a time, until captured ones are replays `SETTLED` times in a row; the number made by then.

    In a run of thousands of steps a shape is new a few times; in a dozen steps it is new most of the time. ``made``:
    steps so far. None where nothing is captured, or steps are still new after `MOST_TO_SETTLE` or at ``deadline``.
    """
    in_a_row = 0
    while (before := provider.replays) is not None and made < MOST_TO_SETTLE and time.monotonic() < deadline:
        if in_a_row == SETTLED:
            return made
        (ready,) = batches.take(1)
        provider.steps([ready.prepared], [ready.index])
        made += 1
        in_a_row = in_a_row + 1 if provider.replays != before else 0
    return None


def _row(cfg: Config, name: str, shapes: str | None, error: str | None = None) -> dict:
    """A row with nothing measured yet."""
    return {
        "op": "train_step",
        "provider": name,
        "mode": "step",
        "batch": cfg.data.batch_size,
        "dtype": cfg.runtime.dtype,
        "shapes": shapes,
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


def counts(provider: Provider, batches: Batches) -> dict:
    """Of a profile, per step: kernel launches (on a CPU: calls of operators); host syncs, ms in which the device did
    anything, plans that cuDNN built and the ms they took (on a CPU: None).

    On CUDA of steps in the middle of some: the batch of the first was not made ready meanwhile, the last has no next
    one.
    """
    edge = 1 if provider.device.type == "cuda" else 0
    taken = batches.take(1 + 3 * edge)

    def mark(i: int) -> contextlib.AbstractContextManager:
        inner = edge <= i < len(taken) - edge
        return torch.profiler.record_function("bench/step") if inner else contextlib.nullcontext()

    _wait(provider.device)
    with profile.profiler(provider.device) as found:
        provider.steps([ready.prepared for ready in taken], [ready.index for ready in taken], mark)
        _wait(provider.device)
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "trace.json")
        found.export_chrome_trace(path)
        with open(path, encoding="utf-8") as f:
            events = json.load(f)
    report, device = profile.analyse(events, within="bench/step"), trace.device(events, "bench/step")
    return {
        "launches_per_step": report.launches,
        "syncs_per_step": report.syncs,
        "device_ms": device.busy_ms,
        "plan_builds_per_step": device.plan_builds,
        "plan_ms": device.plan_ms,
    }


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


def peak_memory(cfg: Config, name: str, limit_s: float = float("inf")) -> dict:
    """Peak resident memory of two steps in a fresh process: bytes above what the built models take (``peak_bytes``) and
    above what importing takes (``peak_after_imports``); None where the system does not report them.

    Raises:
        TimeLimitError: it took more than ``limit_s`` seconds.
    """
    if hardware.resident("VmRSS") is None:
        return {"peak_bytes": None, "peak_after_imports": None}
    return isolated(_peak_memory, (cfg, name), limit_s)


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
