"""How overlap is read from a trace, that it is there, and what the committed results say."""

import json

import pytest

from benchmarks import bench_scaling


def event(name, ts, dur):
    return {"ph": "X", "name": name, "ts": ts, "dur": dur}


def test_overlap_is_the_time_in_which_gradients_travel_and_the_backward_pass_computes():
    trace = [
        event("step/backward", 0, 100),
        event("aten::mm", 0, 40),
        event("aten::gelu_backward", 50, 20),
        event("aten::add", 72, 5),  # no leaf of the backward pass
        event("gloo:all_reduce", 30, 30),  # 10 under the product, 10 under the slope
        event("gloo:all_reduce", 55, 25),  # 10 more, and 10 after everything
        event("gloo:all_reduce", 200, 50),  # of the control group, after the pass
    ]
    found = bench_scaling.overlap({"traceEvents": trace})
    assert found == {"collectives": 2, "collective_ms": 0.05, "hidden": 0.6, "began_before_the_last_operator": 1}
    alone = bench_scaling.overlap({"traceEvents": trace[:4]})
    assert alone["collectives"] == 0 and alone["hidden"] == 0.0


def test_committed_results():
    found = json.loads(bench_scaling.RESULTS.read_text())
    rows = {(r["parallel"], r["processes"]): r for r in found["rows"]}
    assert set(rows) == {("one process", 1), ("ddp", 2), ("ddp", 4), ("fsdp", 2), ("fsdp", 4)}
    assert all(r["largest_difference"] < 1e-6 for r in found["rows"])
    assert all(rows["ddp", n]["hidden"] > 0 for n in (2, 4))
    whole = rows["one process", 1]["held_mb"]
    assert rows["ddp", 2]["held_mb"] == rows["ddp", 4]["held_mb"] == whole
    assert rows["fsdp", 2]["held_mb"] == pytest.approx(whole / 2, rel=0.02)
    assert rows["fsdp", 4]["held_mb"] == pytest.approx(whole / 4, rel=0.05)
