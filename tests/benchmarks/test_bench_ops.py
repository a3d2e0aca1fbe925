"""The op benchmarks: every case agrees with the published algorithm, disagreement is refused; rows and table."""

import json
import sys
import time
from pathlib import Path

import pytest
import torch

from benchmarks import bench_ops
from benchmarks.ops import CASES, Case, Inputs, distance, norm
from benchmarks.ops._inputs import record

memory, timing = bench_ops.memory, bench_ops.timing


@pytest.fixture(scope="module")
def inputs():
    return Inputs(1, torch.device("cpu"), torch.float32)


@pytest.mark.parametrize("name", list(CASES))
def test_every_case_agrees_with_the_reference(inputs, name):
    case = CASES[name](inputs)
    providers = [p for p in ("reference", "eager", "fused") if p in case.functions]
    assert "fused" in providers and len(providers) >= 2
    mode = "full" if case.leaves else "forward"
    assert bench_ops.check(case, bench_ops.functions(case, mode, providers)) == {}


def test_the_floor_is_what_the_docstring_counts(inputs):
    case = norm.target_norm(inputs)
    h = 1568 * 3072 * 4
    assert (case.floor_bytes, case.floor_full) == (2 * h, 5 * h)  # full: h and the gradient are read too


def test_different_results_are_refused(inputs):
    case = distance.mask_distances(inputs)
    case.functions["fused"] = lambda honest=case.functions["fused"]: [1.01 * d for d in honest()]
    errors = bench_ops.check(case, bench_ops.functions(case, "forward", ["reference", "fused"]))
    assert list(errors) == ["fused"] and errors["fused"].startswith("differs from reference by 0.01")


def test_the_latent_losses_are_one_graph_for_the_compiler(inputs):
    """No graph break: the objectives build frozen dataclasses, which not every version of dynamo can rebuild."""
    case = CASES["latent_loss"](inputs)
    graph = torch.compile(record(case.compile_, case.leaves), backend="eager", fullgraph=True)
    case.functions = {"eager": case.functions["eager"], "graph": lambda: graph(*case.leaves)}
    case.atol = 1e-6
    assert bench_ops.check(case, bench_ops.functions(case, "full", case.functions)) == {}


def run(monkeypatch, path, *words):
    """(exit code, rows) of the script on a CPU."""
    words = ["--batch", "1", "--repeats", "3", "--device", "cpu", "--json", str(path), *words]
    monkeypatch.setattr(sys, "argv", ["bench_ops.py", *words])
    monkeypatch.setattr(bench_ops.timing, "copy_bandwidth", lambda device: 1e9)
    return bench_ops.main(), json.loads(path.read_text())


def test_a_provider_that_fails_has_a_row_with_its_error(monkeypatch, tmp_path, capsys):
    """When it is built, compiled, compared or run; the rest of the op and the other ops are measured."""
    dynamo = torch._dynamo.exc.InternalTorchDynamoError

    def uncompilable(fn, **_):
        def call():
            raise dynamo("can't reconstruct\nmore")

        return call

    def late(calls=[]):  # noqa: B006
        calls.append(1)
        if len(calls) > 2:  # beyond the comparison and one call before the clock
            raise RuntimeError("CUDA out of memory")
        return torch.ones(2)

    def case(inputs, **functions):
        functions = {"reference": lambda: torch.ones(2), **functions}
        return Case("op", "shape", functions, compile_=functions["reference"])

    def broken(inputs):
        raise ValueError("no such input")

    made = {
        "broken": broken,
        "wrong": lambda x: case(x, fused=lambda: torch.zeros(2)),
        "late": lambda x: case(x, fused=late),
        "first": lambda x: case(x, reference=lambda: 1 / 0, eager=lambda: torch.ones(2), fused=lambda: torch.ones(2)),
    }
    monkeypatch.setattr(bench_ops, "CASES", made)
    monkeypatch.setattr(torch, "compile", uncompilable)
    code, rows = run(monkeypatch, tmp_path / "rows.json")
    assert code == 1
    errors = {(r["op"], r["provider"]): r["error"] for r in rows}
    assert all(errors["broken", p] == "ValueError: no such input" for p in bench_ops.PROVIDERS)
    assert all(errors[op, "compiled"] == "InternalTorchDynamoError: can't reconstruct" for op in list(made)[1:])
    assert errors["wrong", "fused"].startswith("differs from reference by 1 ")
    assert errors["late", "fused"] == "RuntimeError: CUDA out of memory"
    assert errors["first", "reference"].startswith("ZeroDivisionError")
    good = {("wrong", "reference"), ("late", "reference"), ("first", "eager"), ("first", "fused")}
    assert {key for key, error in errors.items() if error is None} == good
    for r in rows:
        assert (r["median_ms"] is None) == (r["error"] is not None) == (r["repeats"] == 0)
    assert "late forward, fused: RuntimeError: CUDA out of memory" in capsys.readouterr().out


def test_an_error_that_takes_the_gpu_along_ends_the_process(monkeypatch, tmp_path):
    def broken(inputs):
        raise RuntimeError("illegal memory access")

    monkeypatch.setattr(bench_ops, "CASES", {"a": broken, "b": broken})
    monkeypatch.setattr(bench_ops, "unusable", lambda device: True)
    code, rows = run(monkeypatch, tmp_path / "rows.json", "--providers", "fused")
    assert code == bench_ops.LOST and [r["op"] for r in rows] == ["a"]  # b is for another process


def test_what_works_on_the_host_is_timed_by_the_wall(monkeypatch):
    """A GPU's events would see nothing of it; here events that see 1 microsecond, whatever is done."""
    fake, waited = torch.device("cuda"), []
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: waited.append(1))
    monkeypatch.setattr(timing, "_cuda_ms", lambda fn, flush, hold: (fn(), 1e-3)[1])
    monkeypatch.setattr(timing, "_cycles_to_queue", lambda fn: 0)
    monkeypatch.setattr(torch, "empty", lambda *_, **__: torch.zeros(1))
    fns = {"host": lambda: time.sleep(0.02), "device": lambda: None}
    found = timing.times(fns, fake, 3, 1.0, host=["host"])
    assert found["device"] == [1e-3] * 3 and min(found["host"]) > 15
    assert len(waited) == 6  # before and after each
    case = CASES["guided_masks"](Inputs(1, torch.device("cpu"), torch.float32))
    assert case.on_host == ("reference",)


def test_rows_and_table(tmp_path, capsys, monkeypatch):
    code, rows = run(monkeypatch, tmp_path / "rows.json", "--ops", "rope3d,mask_distance", "--providers", "eager,fused")
    assert code == 0 and all(r["error"] is None and r["clock"] == "wall" for r in rows)
    assert [(r["op"], r["provider"], r["mode"]) for r in rows[:6]] == [
        ("rope3d", p, m) for m in ("forward", "backward", "full") for p in ("eager", "fused")
    ]
    for r in rows:
        assert {"shape", "dtype", "median_ms", "peak_bytes", "device", "torch", "triton", "commit"} <= set(r)
        assert 0 < r["min_ms"] <= r["median_ms"] <= r["max_ms"] and r["repeats"] == 3
        if r["floor_bytes"]:
            assert r["gb_per_s"] == pytest.approx(r["floor_bytes"] / r["median_ms"] / 1e6, rel=1e-2, abs=0.01)
    full = {r["provider"]: r["median_ms"] for r in rows if r["mode"] == "full"}
    told = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("| rope3d") and "full" in line)
    assert f"{full['fused']:.3g}" in told and f"{full['eager']:.3g}" in told


@pytest.mark.parametrize(
    ("args", "words"), [(["--ops", "rope"], "'rope' is unknown"), (["--providers", "ours"], "'ours'")]
)
def test_unknown_names(monkeypatch, capsys, args, words):
    monkeypatch.setattr(sys, "argv", ["bench_ops.py", *args])
    with pytest.raises(SystemExit):
        bench_ops.main()
    assert words in capsys.readouterr().err


@pytest.mark.skipif(sys.platform != "linux", reason="peak memory is read from /proc")
def test_peak_memory_counts_what_a_call_takes_at_most():
    def takes(count):
        def fn():
            parts = [torch.ones(8 << 20) for _ in range(count)]  # 32 MiB each
            return parts[0]

        return fn

    cpu = torch.device("cpu")
    one, three = (memory.peak_bytes(takes(n), cpu) for n in (1, 3))
    assert 31 << 20 < one < 40 << 20 and 95 << 20 < three < 110 << 20


def test_the_documented_table_is_that_of_the_committed_results(monkeypatch, capsys):
    root = Path(__file__).parents[2]
    path = root / "benchmarks/results/ops_cpu.json"
    same = {"linear32", "cross_covariance"}  # on a CPU these are the eager code
    assert {r["op"] for r in json.loads(path.read_text())} == set(CASES) - same
    monkeypatch.setattr(sys, "argv", ["bench_ops.py", "--show", str(path)])
    assert bench_ops.main() == 0
    assert capsys.readouterr().out.strip() in (root / "docs/kernels.md").read_text()
