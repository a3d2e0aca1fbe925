"""Every Triton kernel compiles for GPUs that are not here, without spills, and needs no more than was recorded.

All builds but the rare ones, about 0.3 s each, those of attention 1 s. Recorded anew by
``python benchmarks/aot.py --json benchmarks/results/aot.json``.
"""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import aot

ROOT = Path(__file__).parents[2]
needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")


def compiled(*args):
    """benchmarks/aot.py in a process of its own, since here triton may interpret."""
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    return subprocess.run(
        [sys.executable, str(ROOT / "benchmarks" / "aot.py"), *args],
        text=True,
        capture_output=True,
        timeout=900,
        env={**env, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
    )


@needs_triton
def test_no_spills_and_no_regression():
    done = compiled("--quick", "--check", str(ROOT / "benchmarks" / "results" / "aot.json"))
    assert done.returncode == 0, "\n".join(done.stdout.splitlines()[-20:]) + done.stderr
    for arch in aot.ARCHS:
        assert f"sm_{arch}" in done.stdout


@needs_triton
def test_interpreted_kernels_are_not_compiled():
    env = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, str(ROOT / "benchmarks" / "aot.py")], text=True, capture_output=True, timeout=120, env=env
    )
    assert done.returncode == 2 and "TRITON_INTERPRET is set" in done.stderr


def row(**change):
    return {"kernel": "a.b", "arch": 90, "registers": 40, "spill_stores": 0, "spill_loads": 0, "shared": 16, **change}


@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        ([row()], []),
        ([row(registers=48)], []),
        ([row(registers=49)], ["a.b sm_90: registers 49, recorded 40"]),
        ([row(shared=2000)], ["a.b sm_90: shared 2000, recorded 16"]),
        ([row(spill_loads=4)], ["a.b sm_90: spills 0+4 bytes"]),
        ([row(), row(arch=80)], ["a.b sm_80: not recorded; run benchmarks/aot.py --json again"]),
        ([], ["a.b sm_90: recorded, but no kernel of that name; run benchmarks/aot.py --json again"]),
    ],
)
def test_what_counts_as_a_regression(rows, expected):
    assert aot.problems(rows, "3.9.0", {"triton": "3.9.0", "rows": [row()]}) == expected


def test_other_versions_and_partial_runs():
    recorded = {"triton": "3.9.0", "rows": [row(), row(arch=80)]}
    assert aot.problems([row(registers=200)], "3.6.0", recorded) == []
    assert aot.problems([row(spill_stores=8)], "3.6.0", recorded) == ["a.b sm_90: spills 8+0 bytes"]
    assert aot.problems([row()], "3.9.0", recorded, partial=True) == []
