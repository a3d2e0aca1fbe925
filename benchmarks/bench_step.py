"""A whole training step, ours and the published one, on the same weights, clips and masks.

As a script this is ``vjepa-fast bench step`` with the grid of the published recipes on a GPU, or without one the small
case that the CPU figures are of; its options replace these. It writes bench_step.json or bench_step_cuda.json in
benchmarks/results, from which ``benchmarks/plot_step.py`` makes the plot and the table of docs/performance.md:

    python benchmarks/bench_step.py                            # ViT-tiny, 112 px, batch 4 on a CPU
    python benchmarks/bench_step.py --device cuda --budget 420 # ViT-B/16, 224 px, seven recipes, batch 8, 32, 64

Under pytest-benchmark it times ViT-tiny, 112 px, 16 frames, batch 4, float32, the headline objectives (fwm_hw_ld):

    python -m pytest benchmarks/bench_step.py --benchmark-only
    python -m pytest benchmarks/bench_step.py --benchmark-only --json step.json

``--json`` there writes one row per provider: op, shape, dtype, provider, mode, median ms, peak bytes, device.
"""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from vjepa_fast.bench.cases import config_of
from vjepa_fast.bench.providers import Provider
from vjepa_fast.bench.step import about, peak_memory
from vjepa_fast.cli import main
from vjepa_fast.files import write_json

RESULTS = Path(__file__).resolve().parent / "results"
ON_CUDA = [
    "--full-size",
    "--recipes",
    "fwm_hw_ld,baseline,motion_guided,ld,kinematic,spectral,hamiltonian",
    "--batches",
    "8,64,32",
    "--repeats",
    "2",  # what matters most comes first
    "--providers",
    "vjepa_fast,reference,reference_checkpointed,reference_compiled",
]
ON_CPU = ["--providers", "vjepa_fast,reference,reference_checkpointed"]
WARMUP, ROUNDS = 1, 5


@pytest.fixture(scope="module")
def rows(request):
    found: list[dict] = []
    yield found
    path = request.config.getoption("--json")
    if path and found:
        write_json(path, found)


@pytest.mark.parametrize("name", ["vjepa_fast", "reference", "reference_checkpointed"])
def test_step(benchmark, rows, name):
    cfg = config_of()
    provider = Provider(name, cfg)
    count = iter(range(1_000_000))

    def fresh():
        index = next(count)
        return (provider.prepare(index), index), {}

    benchmark.pedantic(provider.step, setup=fresh, rounds=ROUNDS, warmup_rounds=WARMUP)
    row = {
        **about(cfg, provider),
        "mode": "step",
        "median_ms": round(1e3 * benchmark.stats.stats.median, 3),
        "min_ms": round(1e3 * benchmark.stats.stats.min, 3),
        "repeats": ROUNDS,
        **peak_memory(cfg, name),
    }
    benchmark.extra_info.update(row)
    rows.append(row)


if __name__ == "__main__":
    cuda = any(word.startswith("cuda") for word in sys.argv[1:])
    path = RESULTS / ("bench_step_cuda.json" if cuda else "bench_step.json")
    sys.exit(main(["bench", "step", *(ON_CUDA if cuda else ON_CPU), "--json", str(path), *sys.argv[1:]]))
