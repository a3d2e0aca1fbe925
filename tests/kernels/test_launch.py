"""Every launcher binds, specialises and compiles through Triton's own JIT; see ``launches.py``, without a GPU."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
def test_every_kernel_is_launched_with_what_it_was_compiled_for(tmp_path):
    """In a process of its own, since here triton may interpret."""
    env = {k: v for k, v in os.environ.items() if k not in ("TRITON_INTERPRET", "VJEPA_FAST_BACKEND")}
    done = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("launches.py"))],
        text=True,
        capture_output=True,
        timeout=600,
        env={**env, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "TRITON_CACHE_DIR": str(tmp_path)},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    builds = json.loads(done.stdout)
    # numbers of tokens change from step to step: they must not make builds of their own
    assert {k: builds[k] for k in ("_rope3d", "_norm", "_nearest")} == {"_rope3d": 12, "_norm": 10, "_nearest": 1}
    attention = {k.removeprefix("packed_attention_"): n for k, n in builds.items() if k.startswith("packed_attention_")}
    assert attention == {"turn": 2, "forward": 1, "backward_q": 1, "backward_kv": 1}
