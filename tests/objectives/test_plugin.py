"""A term in a module outside of the package: complete by registration alone."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
PLUGIN = """
from dataclasses import dataclass

from vjepa_fast.objectives.api import Objective, number, objective
from vjepa_fast.objectives.reduce import mean_of_entries
from vjepa_fast.ops.latent import RowFunction


def _swirl(z0, z1, h0, h1, p):
    d = (z1 - z0) - p * (h1 - h0)
    return d * d, -2 * d, 2 * d


def _swirl_device():
    import triton

    @triton.jit
    def swirl(z0, z1, h0, h1, p):
        d = (z1 - z0) - p * (h1 - h0)
        return d * d, -2 * d, 2 * d

    return swirl


SWIRL = RowFunction("swirl", "PAIR", _swirl, _swirl_device)


@objective("swirl")
@dataclass(frozen=True)
class Swirl(Objective):
    access = "PAIR"
    needs = frozenset({"z", "h", "masks_enc", "grids"})
    gradient_to = "z"
    published = {"coeff": "optimization.swirl_coeff", "scale": "optimization.swirl_scale"}

    scale: float = number(1.0, above=0.0)

    def lower(self, ctx):
        return (SWIRL(self.scale),)

    def value(self, state, head, ctx):
        entries = [view.mean(view.rows(*self.lower(ctx))) for view in state.temporal()]
        return mean_of_entries(entries, state.outputs("z"))
"""
SCRIPT = """
from tests.interpreter import use_interpreter
use_interpreter()
import torch
from tests.objectives.tiny import random_state
from vjepa_fast import ops
from tests.config.test_config_fair import RUNS, published
from vjepa_fast.config.fair import translate
from vjepa_fast.errors import ConfigError
from vjepa_fast.objectives import build_objectives
values = published(RUNS[0])
before = translate(values)["objectives"]
values["optimization"]["swirl_scale"] = 2
assert "swirl" not in translate(values)["objectives"]
values["optimization"]["swirl_coeff"] = "1e-2"
after = translate(values)["objectives"]
assert after == {**before, "swirl": {"coeff": 0.01, "scale": 2.0}} and list(after)[-1] == "swirl"
assert build_objectives(after, levels=4, embed_dim=8).terms["swirl"].scale == 2.0
values["optimization"]["swirl_scael"] = 1
try:
    translate(values)
except ConfigError as error:
    assert "optimization.swirl_scael" in str(error) and "did you mean swirl_scale?" in str(error)
else:
    raise AssertionError("an unknown key was taken")
plan, found = build_objectives({"swirl": {"scale": 2.0}}, levels=2, embed_dim=4), {}
for backend in ("eager", "triton"):
    state = random_state(grids=((3, 1, 2),), dtype=torch.float32)
    with ops.use_backend(backend):
        total = plan(state).total
        found[backend] = [total, *torch.autograd.grad(total, state.z[0])]
torch.testing.assert_close(found["triton"], found["eager"])
assert found["eager"][0] > 0
"""


def test_a_plugin_brings_a_term_its_published_keys_and_its_kernel(tmp_path):
    (tmp_path / "swirl_plugin.py").write_text(PLUGIN)
    path = os.pathsep.join([str(tmp_path), str(ROOT), os.environ.get("PYTHONPATH", "")])
    env = {**os.environ, "PYTHONPATH": path, "VJEPA_FAST_PLUGINS": "swirl_plugin"}
    done = subprocess.run([sys.executable, "-c", SCRIPT], env=env, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    contract = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", "swirl"]
    files = [f"tests/objectives/{name}.py" for name in ("test_contract", "test_packed")]
    done = subprocess.run([*contract, *files], env=env, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and "passed" in done.stdout, done.stdout
