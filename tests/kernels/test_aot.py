"""Every Triton kernel compiles for GPUs that are not here, without spills, and needs no more than was recorded.

What differs from what was recorded is compiled, about 0.3 s each, attention 1 s. Recorded anew by
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
    done = compiled("--changed", "--check", str(ROOT / "benchmarks" / "results" / "aot.json"))
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


@needs_triton
def test_only_builds_of_the_recorded_digest_are_taken_as_they_were(monkeypatch):
    monkeypatch.setattr(aot, "digest", lambda name, arch: f"{name}{arch}")
    rows = [row(kernel=f"k{i}", digest=f"k{i}90") for i in range(10)]
    rows[3]["digest"], rows[4]["arch"] = "another", 80
    del rows[5]["digest"]
    builds = [(f"k{i}", 90) for i in range(12)]
    known = aot.unchanged(builds, {"rows": rows}, spread=4)  # of 7 the first and the fifth are compiled all the same
    assert [name for name, _ in known] == ["k1", "k2", "k6", "k8", "k9"]
    assert all(known[build] is rows[int(build[0][1:])] for build in known)


def test_digests_follow_the_kernel_its_helpers_constants_and_options():
    done = subprocess.run(
        [sys.executable, "-c", DIGESTS],
        text=True,
        capture_output=True,
        env={**{k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}, "PYTHONPATH": str(ROOT)},
    )
    assert done.returncode == 0, done.stderr[-2000:]


DIGESTS = """
from benchmarks import aot
name = "packed_attention.forward_64_bf16_90"
first, variant = aot.digest(name, 90), aot.all_variants()[name]
assert first == aot.digest(name, 90)
for change in (dict(num_warps=2 * variant["num_warps"]), dict(aligned=[]), dict(num_stages=7)):
    before = {key: variant.get(key) for key in change}
    variant.update(change)
    assert aot.digest(name, 90) != first, change
    variant.update(before)
assert aot.digest(name, 90) == first and aot.digest(name, 100) != first
key = next(k for k, v in variant["constexprs"].items() if type(v) is int)
variant["constexprs"][key] += 1
assert aot.digest(name, 90) != first
"""


def test_other_versions_and_partial_runs():
    recorded = {"triton": "3.9.0", "rows": [row(), row(arch=80)]}
    assert aot.problems([row(registers=200)], "3.6.0", recorded) == []
    assert aot.problems([row(spill_stores=8)], "3.6.0", recorded) == ["a.b sm_90: spills 8+0 bytes"]
    assert aot.problems([row()], "3.9.0", recorded, partial=True) == []
