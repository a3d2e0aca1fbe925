"""What a profile says of the device and of cuDNN that the table of ``metrics/profile.py`` does not."""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass

PLAN_MS = 1.0  # a call of cuDNN that holds the host longer builds a plan; one whose plan exists takes about 0.1

_DEVICE = ("kernel", "gpu_memcpy", "gpu_memset")
_HOST = ("cuda_runtime", "cuda_driver")
_NOT_PLANNING = ("cudaLaunch", "cuLaunch", "cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize")


@dataclass
class Device:
    """Per step. All None where the trace has no device.

    Attributes:
        busy_ms: time in which the device did anything for the step; what runs at once on two streams counts once.
        plan_builds: calls of cuDNN's operators that held the host for more than `PLAN_MS` without launching or waiting.
            The profiler has no event of its own for a plan: this is what building one looks like.
        plan_ms: host time of these calls.
    """

    busy_ms: float | None = None
    plan_builds: float | None = None
    plan_ms: float | None = None


def device(trace: dict, within: str) -> Device:
    """Of a chrome trace (as read from its JSON), what the host launched in the ranges named ``within``."""
    events = [e for e in trace["traceEvents"] if e.get("ph") == "X" and "dur" in e and "cat" in e]
    ranges = sorted(
        (e["ts"], e["ts"] + e["dur"]) for e in events if e["cat"] == "user_annotation" and e["name"] == within
    )
    if not ranges or not any(e["cat"] in _DEVICE for e in events):
        return Device()
    starts = [begin for begin, _ in ranges]

    def inside(e: dict) -> bool:
        at = bisect_right(starts, e["ts"]) - 1
        return at >= 0 and e["ts"] <= ranges[at][1]

    calls = [e for e in events if e["cat"] in _HOST and inside(e)]
    launched = {e["args"]["correlation"] for e in calls if "correlation" in e.get("args", {})}
    work = [e for e in events if e["cat"] in _DEVICE and e.get("args", {}).get("correlation") in launched]
    plans = [own for e in _outermost(events, "cudnn") if inside(e) and (own := _planning(e, calls)) >= 1e3 * PLAN_MS]
    steps = len(ranges)
    busy = _union((e["ts"], e["ts"] + e["dur"]) for e in work)
    return Device(busy / 1e3 / steps, len(plans) / steps, sum(plans) / 1e3 / steps)


def _outermost(events: list[dict], word: str) -> list[dict]:
    """Operators whose name has ``word`` in it, but for those that another such one calls."""
    found: list[dict] = []
    until: dict[tuple, float] = {}  # thread -> end of the last one kept
    named = (e for e in events if e["cat"] == "cpu_op" and word in e["name"] and not e["name"].startswith("autograd::"))
    for e in sorted(named, key=lambda e: (e["ts"], -e["dur"])):
        thread = e["pid"], e["tid"]
        if e["ts"] >= until.get(thread, float("-inf")):
            until[thread] = e["ts"] + e["dur"]
            found.append(e)
    return found


def _planning(operator: dict, calls: list[dict]) -> float:
    """Microseconds of an operator without what it spent on launches and on waiting for the device."""
    begin, end, thread = operator["ts"], operator["ts"] + operator["dur"], operator["tid"]
    spent = (e for e in calls if e["tid"] == thread and begin <= e["ts"] < end and e["name"].startswith(_NOT_PLANNING))
    return operator["dur"] - sum(e["dur"] for e in spent)


def _union(spans) -> float:
    total, reached = 0.0, float("-inf")
    for begin, end in sorted(spans):
        total += max(0.0, end - max(begin, reached))
        reached = max(reached, end)
    return total
