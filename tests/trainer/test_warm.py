"""Kernels built ahead: the builds are those that the step looks for, in processes of their own, since here Triton may
interpret."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from vjepa_fast.ops import _builds
from vjepa_fast.trainer import warm

ROOT = Path(__file__).parents[2]
needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")


@pytest.fixture
def plain(monkeypatch, tmp_path):
    """The environment of processes that compile, with an empty cache."""
    for name in ("TRITON_INTERPRET", "VJEPA_FAST_BACKEND"):
        monkeypatch.delenv(name, raising=False)
    for name, value in (("PYTHONPATH", str(ROOT)), ("OMP_NUM_THREADS", "1"), ("TRITON_CACHE_DIR", str(tmp_path))):
        monkeypatch.setenv(name, value)


@needs_triton
def test_what_was_built_ahead_is_what_the_step_launches(plain):
    from .warm_step import small

    kernels = {}
    summary = warm.Warming(small(), torch.float32, 90, jobs=2, on_kernel=kernels.__setitem__).finish()
    assert not summary.error and not summary.failed, str(summary)
    count = sum(map(len, kernels.values()))
    assert summary.builds == summary.compiled == count and f"{count} kernels ready" in str(summary)
    done = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("warm_step.py"))], text=True, capture_output=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-3000:]
    step = json.loads(done.stdout)
    assert step["compiled"] == []
    assert {"_patchify", "token", "token_sign", "pair_forward", "pair_backward"} <= set(step["found"])


def test_a_run_goes_on_where_nothing_can_be_built(monkeypatch):
    """A child that fails or takes too long, and a build that fails: said in the one line, left to the launch."""
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    summary = warm.Warming(warm.configs.Config(), torch.bfloat16, 90).finish()
    assert summary.builds == 0 and "TRITON_INTERPRET=1 is set" in str(summary)
    late = warm.Warming(warm.configs.Config(), torch.bfloat16, 90).finish(limit_s=0.0)
    assert "not done within 0 s" in str(late)
    broken = _builds.Built("token", 0.1, False, "CompilationError: at 3:1")
    assert "1 failed (token: CompilationError: at 3:1)" in str(warm.Summary(2, 1, [broken], 1.0))


class Quick:
    """A `Warming` that is done at once."""

    def __init__(self, cfg, dtype, arch):
        self.arch, self.stopped = arch, False
        made.append(self)

    def finish(self):
        return warm.Summary(3, 2, [], 1.5)

    def stop(self):
        self.stopped = True


made = []


@needs_triton
def test_a_run_on_cuda_is_warmed_once_and_one_on_a_cpu_is_not(monkeypatch, tmp_path):
    """One line for the log; the other process does not outlive an error, and is the business of the first rank."""
    for name, value in (("Warming", Quick), ("inductor_workers", lambda: None), ("capability", lambda device: 90)):
        monkeypatch.setattr(warm, name, value)
    monkeypatch.setattr(_builds, "objections", list)
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    made.clear()
    notes = []
    for device in ("cpu", "cuda:1", "cuda:0", "cuda:0"):
        with warm.ahead(warm.configs.Config(), torch.device(device), torch.bfloat16, notes):
            pass
    assert notes == ["3 kernels ready in 1.5 s, 2 of them compiled now"] and [m.arch for m in made] == [90]
    other = warm.configs.Config(seed=3)
    with pytest.raises(MemoryError), warm.ahead(other, torch.device("cuda"), torch.bfloat16, notes):
        raise MemoryError
    assert len(notes) == 1 and made[-1].stopped
