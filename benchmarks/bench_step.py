"""A whole training step on the CPU under pytest-benchmark: ours and the reference, same weights, clips and masks.

ViT-tiny, 112 px, 16 frames, batch 4, float32, the objectives of the headline run (fwm_hw_ld). From the root:

    python -m pytest benchmarks/bench_step.py --benchmark-only
    python -m pytest benchmarks/bench_step.py --benchmark-only --json step.json

``--json`` writes one row per provider: op, shape, dtype, provider, mode, median ms, peak bytes, device. The table of
``vjepa-fast bench step`` measures the same by turns.
"""
from __future__ import annotations

import argparse
import json

import pytest

from vjepa_fast.cli import bench

WARMUP, ROUNDS = 1, 5


def settings():
    parser = argparse.ArgumentParser()
    bench.add_arguments(parser)
    return bench.config_of(parser.parse_args(["step"]))


@pytest.fixture(scope="module")
def rows(request):
    found: list[dict] = []
    yield found
    path = request.config.getoption("--json")
    if path and found:
        with open(path, "w", encoding="utf-8") as f:
            json.dump(found, f, indent=1)
            f.write("\n")


@pytest.mark.parametrize("name", ["vjepa_fast", "reference"])
def test_step(benchmark, rows, name):
    cfg = settings()
    provider = bench.Provider(name, cfg)
    count = iter(range(1_000_000))

    def fresh():
        index = next(count)
        return (provider.prepare(index), index), {}

    benchmark.pedantic(provider.step, setup=fresh, rounds=ROUNDS, warmup_rounds=WARMUP)
    row = {**bench.describe(cfg, provider), "mode": "step", "median_ms": round(1e3 * benchmark.stats.stats.median, 3),
           "min_ms": round(1e3 * benchmark.stats.stats.min, 3), "repeats": ROUNDS,
           "peak_bytes": bench.peak_bytes(cfg, name)}
    benchmark.extra_info.update(row)
    rows.append(row)
