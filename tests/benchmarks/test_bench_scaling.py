"""How overlap is read from a trace, that it is there, and what the committed results say."""

import json

import pytest

from benchmarks import bench_scaling


def event(name, ts, dur, tid=1):
    return {"ph": "X", "name": name, "ts": ts, "dur": dur, "tid": tid}


def test_overlap_is_the_time_in_which_gradients_travel_and_the_backward_pass_computes():
    trace = [
        event("step/backward", 0, 100),
        event("aten::mm", 0, 40),
        event("vjepa_fast_cpp::norm_backward", 50, 20),
        event("c10d::allreduce_", 70, 5),  # computes nothing
        event("aten::add", 70, 30, tid=2),  # of another thread
        event("aten::mm", 110, 60),  # after the pass
        event("gloo:all_reduce", 30, 30, tid=3),  # 10 under the product, 10 under the norm
        event("gloo:all_reduce", 55, 25, tid=3),  # 15, of which the first has 5 too, and 10 under nothing
        event("gloo:all_reduce", 84, 16, tid=4),
        event("gloo:all_reduce", 200, 50),  # of the control group, after the pass
    ]
    found = bench_scaling.overlap({"traceEvents": trace})
    share = round((10 + 20) / (50 + 16), 4)
    assert found == {"collectives": 3, "collective_ms": 0.066, "hidden": share, "mostly_hidden": 2}
    alone = bench_scaling.overlap({"traceEvents": trace[:6]})
    assert alone == {"collectives": 0, "collective_ms": 0.0, "hidden": 0.0, "mostly_hidden": 0}


def test_committed_results():
    found = json.loads(bench_scaling.RESULTS.read_text())
    rows = {(r["size"], r["parallel"], r["processes"]): r for r in found["rows"]}
    assert set(rows) == {(s, p if n > 1 else "one process", n) for s, n, p in bench_scaling.WAYS}
    assert all(r["largest_difference"] < 1e-6 for r in found["rows"])
    whole = rows["small", "one process", 1]["held_mb"]
    assert rows["small", "ddp", 2]["held_mb"] == rows["small", "ddp", 4]["held_mb"] == whole
    assert rows["small", "fsdp", 2]["held_mb"] == pytest.approx(whole / 2, rel=0.02)
    assert rows["small", "fsdp", 4]["held_mb"] == pytest.approx(whole / 4, rel=0.05)
    assert rows["large", "ddp", 2]["hidden"] > 0.5 and rows["large", "ddp", 2]["mostly_hidden"] >= 3
