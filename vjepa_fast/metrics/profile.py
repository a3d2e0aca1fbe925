"""Where a step goes: ranges that the step marks, torch's profiler around some of its calls, and a table of the trace.

    profile/trace.json   for chrome://tracing or ui.perfetto.dev
    profile/table.txt    by phase and by operator; also printed

The table is made from the trace alone. On CUDA a kernel belongs to the phase and operator that launched it; on a CPU
it has the times of the ranges. The step is the range ``step/all``; what is done for the next one while the device works
on it (data, copies, masks) lies outside and counts too.
"""

from __future__ import annotations

import contextlib
import functools
from bisect import bisect_right
from collections import defaultdict
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path

import torch

from vjepa_fast.files import parse_json, write_text

PHASES = ("data", "copy", "masks", "target", "context", "predictor", "losses", "backward", "optimiser", "ema", "graph")
WHOLE, AHEAD = "step/all", ("copy", "masks")  # what may be done for the next step outside of any
WARMUP = 2  # steps before the profiled ones: compilation, allocator, first launches
TOP = 15  # operators in the table

_DEVICE = ("kernel", "gpu_memcpy", "gpu_memset")
_LAUNCHES = ("cudaLaunch", "cuLaunch", "cudaGraphLaunch")
_SYNCS = (
    "cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize",
    "cuStreamSynchronize", "cuCtxSynchronize", "cuEventSynchronize"
)  # fmt: skip
_EVENT_SYNC = "EventSynchronize"
WAITED_US = 20  # an event that has already passed is asked in less: that is no wait
_SYNC_COPIES = ("cudaMemcpy", "cudaMemcpy2D", "cudaMemcpyToSymbol", "cudaMemcpyFromSymbol")


def unheard(name: str) -> None:
    """Nobody wants to know what a process does."""


mark: Callable[[str], None] = unheard  # called with the name of each part of a step that begins


def phase(name: str) -> AbstractContextManager[object]:
    """A context that marks what runs in it as that part of the step; free where no profiler runs."""
    mark(name)
    if getattr(torch.autograd.profiler, "_is_profiler_enabled", True):
        return torch.profiler.record_function(f"step/{name}")
    return contextlib.nullcontext()


def whole_step(method):
    """Decorator: a call is one step."""

    @functools.wraps(method)
    def inner(*args, **kwargs):
        with phase(WHOLE.removeprefix("step/")):
            return method(*args, **kwargs)

    return inner


@dataclass
class Line:
    """Of a phase or an operator, per step: ``ms`` on the host, ``device_ms`` of its kernels, calls or launches."""

    name: str
    ms: float = 0.0
    device_ms: float = 0.0
    calls: float = 0.0
    syncs: float = 0.0


@dataclass
class Report:
    """What `table` prints; all but ``steps`` per step."""

    steps: int
    cuda: bool
    step_ms: float  # data wait and step, on the host
    device_ms: float  # all kernels and copies of a step; 0 on a CPU
    launches: float  # kernel launches per step; on a CPU calls of operators
    syncs: float | None  # host waits for the device per step; None on a CPU
    phases: list[Line] = field(default_factory=list)
    operators: list[Line] = field(default_factory=list)


def _is_call(event: dict) -> bool:
    """An operator of a library, such as aten::mm: not a range, nor a node of autograd, which calls such."""
    return event["cat"] == "cpu_op" and "::" in event["name"] and not event["name"].startswith("autograd::")


def _waits(event: dict) -> bool:
    """Whether the host waited for the device here."""
    name = event["name"]
    if _EVENT_SYNC in name and event["dur"] < WAITED_US:
        return False
    return name in _SYNC_COPIES or name.startswith(_SYNCS)


class _Ranges:
    """Ranges of one name, to ask whether a moment lies in one. They must not overlap."""

    def __init__(self, events: list[dict]):
        self.bounds = sorted((e["ts"], e["ts"] + e["dur"]) for e in events)
        self.starts = [b for b, _ in self.bounds]
        self.total = sum(b - a for a, b in self.bounds)

    def holds(self, moment: float) -> bool:
        i = bisect_right(self.starts, moment) - 1
        return i >= 0 and moment <= self.bounds[i][1]

    def total_in(self, other: _Ranges) -> float:
        """Time of the ranges that begin in one of ``other``."""
        return sum(b - a for a, b in self.bounds if other.holds(a))


def analyse(trace: dict, within: str = WHOLE) -> Report:
    """The table of a chrome trace (as read from its JSON) that holds ranges named ``within``.

    Raises:
        ValueError: it holds none.
    """
    events = [e for e in trace["traceEvents"] if e.get("ph") == "X" and "dur" in e and "cat" in e]
    named = defaultdict(list)
    for e in events:
        if e["cat"] == "user_annotation":
            named[e["name"]].append(e)
    if not named[within]:
        raise ValueError(f"trace: expected ranges named {within!r}, got none")
    step, steps = _Ranges(named[within]), len(named[within])
    phases = {name: _Ranges(named[f"step/{name}"]) for name in PHASES}
    phase_lines = {name: Line(name, ms=r.total) for name, r in phases.items()}
    operators: dict[str, Line] = {}

    def phase_at(moment: float) -> Line | None:
        return next((phase_lines[n] for n, r in phases.items() if r.holds(moment)), None)

    def operator(name: str) -> Line:
        return operators.setdefault(name, Line(name))

    launched: dict[int, tuple[str, float]] = {}  # correlation -> operator and moment of the launch
    total = Line("all")
    cuda = any(e["cat"] in _DEVICE for e in events)
    for event, parents, own in _nested(events):
        moment, name = event["ts"], event["name"]
        at = phase_at(moment)
        ahead = within == WHOLE and at is not None and at.name in AHEAD
        if not ahead and not step.holds(moment):
            continue
        caller = next((p["name"] for p in reversed(parents) if p["cat"] == "cpu_op"), "(no operator)")
        if event["cat"] == "cpu_op":
            line = operator(name)
            line.ms += own
            if _is_call(event):
                line.calls += 1
                if not cuda and not any(map(_is_call, parents)):
                    _count(total, at, "calls")
        elif event["cat"] in ("cuda_runtime", "cuda_driver"):
            launched[event.get("args", {}).get("correlation", -1)] = caller, moment
            operator(caller).ms += event["dur"]
            if name.startswith(_LAUNCHES):
                _count(total, at, "calls")
            if _waits(event):
                _count(total, at, "syncs")
    for event in events:
        found = launched.get(event.get("args", {}).get("correlation", -1)) if event["cat"] in _DEVICE else None
        if found is None:
            continue
        for line in (total, operator(found[0]), phase_at(found[1])):
            if line is not None:
                line.device_ms += event["dur"]
    known = [line for line in phase_lines.values() if line.ms]
    unmarked = step.total - sum(r.total_in(step) for r in phases.values())
    others = (getattr(total, k) - sum(getattr(x, k) for x in known) for k in ("device_ms", "calls", "syncs"))
    rest = Line("rest", unmarked, *others)
    top = sorted(operators.values(), key=lambda x: x.device_ms if cuda else x.ms, reverse=True)[:TOP]
    for line in (*known, rest, *top, total):
        line.ms, line.device_ms = line.ms / 1e3 / steps, line.device_ms / 1e3 / steps
        line.calls, line.syncs = line.calls / steps, line.syncs / steps
    step_ms = sum(line.ms for line in (*known, rest))
    syncs = total.syncs if cuda else None
    return Report(steps, cuda, step_ms, total.device_ms, total.calls, syncs, [*known, rest], top)


def _count(total: Line, at: Line | None, what: str) -> None:
    for line in (total, at):
        if line is not None:
            setattr(line, what, getattr(line, what) + 1)


def _nested(events: list[dict]):
    """(event, its callers, time without what it calls) of what a host thread did."""
    threads = defaultdict(list)
    for e in events:
        if e["cat"] in ("cpu_op", "cuda_runtime", "cuda_driver"):
            threads[e["pid"], e["tid"]].append(e)
    for thread in threads.values():
        thread.sort(key=lambda e: (e["ts"], -e["dur"]))
        inside = [0.0] * len(thread)  # time of what each calls
        callers: list[list[int]] = []
        stack: list[int] = []
        for i, e in enumerate(thread):
            while stack and e["ts"] >= thread[stack[-1]]["ts"] + thread[stack[-1]]["dur"]:
                stack.pop()
            callers.append(list(stack))
            if stack:
                inside[stack[-1]] += e["dur"]
            stack.append(i)
        for i, e in enumerate(thread):
            yield e, [thread[c] for c in callers[i]], max(0.0, e["dur"] - inside[i])


def table(report: Report) -> str:
    """Plain text for a person."""
    cuda, r = report.cuda, report
    syncs = "-" if r.syncs is None else f"{r.syncs:g}"
    head = f"{r.steps} steps, {r.step_ms:.2f} ms each under the profiler; per step: " + (
        f"{r.device_ms:.2f} ms of kernels ({100 * r.device_ms / max(r.step_ms, 1e-9):.0f} % of the time), "
        f"{r.launches:.0f} kernel launches, {syncs} host syncs"
        if cuda
        else f"{r.launches:.0f} operator calls, host syncs {syncs}"
    )
    whole = r.device_ms if cuda else r.step_ms
    calls = "launches" if cuda else "calls"
    lines = [head, "", f"{'phase':<14}{'host ms':>10}{'device ms':>11}{'share':>8}{calls:>10}{'syncs':>7}"]
    for x in r.phases:
        share = 100 * (x.device_ms if cuda else x.ms) / max(whole, 1e-9)
        device, waits = (f"{x.device_ms:.2f}", f"{x.syncs:g}") if cuda else ("-", "-")
        lines.append(f"{x.name:<14}{x.ms:>10.2f}{device:>11}{share:>6.1f} %{x.calls:>10.0f}{waits:>7}")
    lines += ["", f"{'operator (own time)':<54}{'host ms':>10}{'device ms':>11}{'share':>8}{'calls':>8}"]
    for x in r.operators:
        share = 100 * (x.device_ms if cuda else x.ms) / max(whole, 1e-9)
        device = f"{x.device_ms:.2f}" if cuda else "-"
        name = x.name if len(x.name) < 54 else x.name[:50] + "..."
        lines.append(f"{name:<54}{x.ms:>10.2f}{device:>11}{share:>6.1f} %{x.calls:>8.0f}")
    return "\n".join(lines) + "\n"


def profiler(device: torch.device) -> torch.profiler.profile:
    """Torch's profiler for a device: start it, stop it, export the trace."""
    kinds = [torch.profiler.ProfilerActivity.CPU]
    if device.type == "cuda":
        kinds.append(torch.profiler.ProfilerActivity.CUDA)
    return torch.profiler.profile(activities=kinds)


class StepProfiler:
    """Profiles steps ``WARMUP + 1`` to ``WARMUP + steps`` of a run; call ``step`` after each. 0 steps: does nothing."""

    def __init__(self, steps: int, folder: Path, device: torch.device):
        self.steps, self.folder, self.device = steps, folder / "profile", device
        self.made, self.running = 0, None

    def __enter__(self) -> StepProfiler:
        return self

    def __exit__(self, kind, *_) -> None:
        if self.running is not None and (kind is not None or self.made == WARMUP):
            self.running.stop()
        elif self.running is not None:  # the run was shorter than asked for
            self._write()
        if self.steps and self.made <= WARMUP and kind is None:
            print(f"profile: nothing to show, the run made {self.made} steps; the first {WARMUP} are not profiled")

    def step(self) -> None:
        """Count a step that was made; starts and ends the profile when its time has come."""
        if not self.steps:
            return
        self.made += 1
        if self.made == WARMUP:
            self.running = profiler(self.device)
            self.running.start()
        elif self.made == WARMUP + self.steps:
            self._write()

    def _write(self) -> None:
        done, self.running = self.running, None
        assert done is not None
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        done.stop()
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / "trace.json"
        done.export_chrome_trace(str(path))
        with open(path, encoding="utf-8") as f:
            text = table(analyse(parse_json(f.read())))
        write_text(self.folder / "table.txt", text)
        print(f"{text}\n{path}", flush=True)
