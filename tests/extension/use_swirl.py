# ruff: noqa: E402, I001, PT017 (Triton's interpreter is switched on before anything imports it)
"""Run in a process of its own with `swirl` as a plugin: its published keys, and its kernel against eager."""

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
