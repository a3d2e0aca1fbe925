"""The op benchmarks: every case agrees with the published algorithm, disagreement is refused; rows and table."""

import json
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import bench_ops
from benchmarks.ops import CASES, Inputs, distance, norm

memory = bench_ops.memory


@pytest.fixture(scope="module")
def inputs():
    return Inputs(1, torch.device("cpu"), torch.float32)


@pytest.mark.parametrize("name", list(CASES))
def test_every_case_agrees_with_the_reference(inputs, name):
    case = CASES[name](inputs)
    providers = [p for p in ("reference", "eager", "fused") if p in case.functions]
    assert "fused" in providers and len(providers) >= 2
    mode = "full" if case.leaves else "forward"
    bench_ops.check(case, bench_ops.functions(case, mode, providers))


def test_the_floor_is_what_the_docstring_counts(inputs):
    case = norm.target_norm(inputs)
    h = 1568 * 3072 * 4
    assert (case.floor_bytes, case.floor_full) == (2 * h, 5 * h)  # full: h and the gradient are read too


def test_different_results_are_refused(inputs):
    case = distance.mask_distances(inputs)
    case.functions["fused"] = lambda honest=case.functions["fused"]: [1.01 * d for d in honest()]
    with pytest.raises(SystemExit, match="mask_distance: fused differs from reference by 0.01"):
        bench_ops.check(case, bench_ops.functions(case, "forward", ["reference", "fused"]))


def test_rows_and_table(tmp_path, capsys, monkeypatch):
    path = tmp_path / "rows.json"
    monkeypatch.setattr(
        sys,
        "argv",
        [
            "bench_ops.py",
            "--ops",
            "rope3d,mask_distance",
            "--providers",
            "eager,fused",
            "--batch",
            "1",
            "--repeats",
            "3",
            "--device",
            "cpu",
            "--json",
            str(path),
        ],
    )
    assert bench_ops.main() == 0
    rows = json.loads(path.read_text())
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
    assert {r["op"] for r in json.loads(path.read_text())} == set(CASES)
    monkeypatch.setattr(sys, "argv", ["bench_ops.py", "--show", str(path)])
    assert bench_ops.main() == 0
    assert capsys.readouterr().out.strip() in (root / "docs/kernels.md").read_text()
