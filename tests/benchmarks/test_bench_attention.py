"""bench_attention runs on a CPU: every backend has a row, and tiles are tuned and put back."""

import importlib.util
import itertools
import json

import pytest
import torch

from benchmarks import bench_attention
from vjepa_fast.layers.attention import BACKENDS


def test_every_backend_has_a_row(tmp_path, capsys):
    path = tmp_path / "rows.json"
    words = "--device=cpu --dtype=float32 --batch=1 --repeats=3 --budget=0 --grid 2 2 4"
    assert bench_attention.main([*words.split(), "--json", str(path)]) == 0
    rows = json.loads(path.read_text())
    found = {(r["shape"], r["mode"], r["provider"]) for r in rows}
    modes = {("target", "forward"), *((s, m) for s in ("context", "predictor") for m in ("forward", "full"))}
    assert found == {(*where, name) for where in modes for name in BACKENDS}
    for row in rows:
        assert (row["error"] is None) == (row["median_ms"] is not None)
        assert row["provider"] != "sdpa" or (row["error"] is None and row["tflops"] is not None)
    assert "needs CUDA" in capsys.readouterr().out


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
def test_tiles_are_tuned_and_put_back(monkeypatch):
    from vjepa_fast.kernels import packed_attention as kernels

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    monkeypatch.setattr(bench_attention, "CANDIDATES", ((32, 32, 4, 2), (64, 32, 4, 2)))
    monkeypatch.setattr(bench_attention, "HEADS", 1)
    clock = itertools.count(100, -1)  # each choice is quicker than those before

    def times(fns, *_, **__):
        return {name: [float(next(clock))] for name, fn in fns.items() if fn() is not None}

    monkeypatch.setattr(bench_attention.timing, "times", times)
    before = dict(kernels.TILES), dict(kernels.SHARE)
    qkv = torch.zeros(1, 20, 3 * 16, dtype=torch.bfloat16, device=device)
    shape = bench_attention.Shape("small", qkv, torch.zeros(20, 2, 12, device=device), [18], True)
    found = dict(bench_attention.tune(shape, 1, 0.0))
    tiles = [kernels.Tiles(*choice) for choice in reversed(bench_attention.CANDIDATES)]
    assert list(found) == ["forward", "backward_q", "backward_kv", "SHARE"]
    assert [[choice for _, choice in pairs] for pairs in found.values()] == [tiles, tiles, tiles, [4, 2, 1, 0]]
    assert before == (kernels.TILES, kernels.SHARE)
