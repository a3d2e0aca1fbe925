"""Captured steps on a GPU, with the real capture, against steps that are not captured."""

import pytest
import torch

from vjepa_fast.trainer.step import TrainStep

from .conftest import batch, config
from .test_captured import CHANGING, OPTIMIZATION, micro


@pytest.mark.skipif(not torch.cuda.is_available(), reason="the real capture needs a GPU")
@pytest.mark.parametrize("form", ["whole", "part"])
@pytest.mark.parametrize("compile", [False, "blocks"])
def test_real_graphs(form, compile):
    """On a GPU: captured steps against steps that are not, in bfloat16."""
    optimization = {**OPTIMIZATION, "accumulate": 2 if form == "part" else 1}
    sections = {"optimization": optimization, "model": {"pred_embed_dim": 64}, "objectives": CHANGING}
    steps = [
        TrainStep(
            config(runtime={"device": "cuda", "compile": compile, "cuda_graphs": on}, **sections),
            device="cuda",
            dtype=torch.bfloat16,
        )
        for on in (True, False)
    ]
    data = micro if form == "part" else lambda i: batch(0)
    for i in range(8):
        mine, other = (step([step.stage(b, 0) for b in _listed(data(i))], i) for step in steps)
        torch.testing.assert_close(mine.loss, other.loss, rtol=2e-2, atol=1e-3)
    assert steps[0].captured.graphs.captured and not steps[0].captured.graphs.off
    for name in ("encoder", "predictor", "target_encoder"):
        mine, other = ([p.detach().clone() for p in getattr(step, name).parameters()] for step in steps)
        fresh = TrainStep(steps[0].cfg, device="cuda", dtype=torch.bfloat16)
        begun = [p.detach() for p in getattr(fresh, name).parameters()]
        assert any(not torch.equal(a, b) for a, b in zip(mine, begun))
        for a, b in zip(mine, other):
            torch.testing.assert_close(a, b, rtol=2e-2, atol=2e-3)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="the real capture needs a GPU")
def test_graphs_by_turns():
    """Two shapes in one pool of memory: what one graph computes in between must not lie on tables of the other."""
    runtime = {"device": "cuda", "compile": False}
    steps = [
        TrainStep(config(runtime={**runtime, "cuda_graphs": on}), device="cuda", dtype=torch.bfloat16)
        for on in (True, False)
    ]
    for i in range(12):
        data = batch(i % 2, size=2 + i % 2)
        mine, other = (step(step.stage(data, i % 2), i) for step in steps)
        torch.testing.assert_close(mine.loss, other.loss, rtol=2e-2, atol=1e-3)
    assert len(steps[0].captured.graphs.captured) >= 2
    for a, b in zip(steps[0].params, steps[1].params):
        torch.testing.assert_close(a, b, rtol=5e-2, atol=5e-3)


def _listed(x):
    return x if isinstance(x, list) else [x]
