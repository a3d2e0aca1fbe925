"""Whole steps with the blocks of a GPU, by the eager code of their ops: as with plain blocks."""

import pytest
import torch

from vjepa_fast.layers import fused_block
from vjepa_fast.layers.block import Block
from vjepa_fast.trainer.preflight import check
from vjepa_fast.trainer.step import TrainStep

from .conftest import batch, config

CASES = {
    "streams": ({"runtime": {"capacity_quantum": 16}}, [batch()]),
    "exact lengths, two groups": ({"data": {"dataset_fpcs": (4, 8)}}, [batch(frames=(4, 8))]),
    "all tokens": ({"masks": {"truncate": "none"}}, [batch()]),
    "images, accumulation": ({}, [batch(), batch(1, frames=(1,), modality="image")]),
    "online": ({"objectives": {"pred": {}, "kinematic": {}}, "target": {"mode": "online"}}, [batch()]),
    "checkpointing": ({"model": {"use_activation_checkpointing": True}}, [batch()]),
}


def trained(options, batches, dtype=torch.float32):
    """Losses and gradients of two steps, and the weights after them; and features of the last."""
    step = TrainStep(config(**options), dtype=dtype)
    found = []
    for index in range(2):
        out = step(batches, index)
        found += [out.loss, *out.terms.values(), *(p.grad for p in step.params if p.grad is not None)]
    state = step.forward(batches[0], 2)
    return [*found, *step.params], state


@pytest.fixture
def fused(monkeypatch):
    """Turns the fused blocks on, in any dtype; the number of their stacks that ran."""

    def turn_on():
        real, ran = fused_block.apply, []
        monkeypatch.setattr(fused_block, "supports", lambda *_: True)
        monkeypatch.setattr(fused_block, "apply", lambda *args: ran.append(len(args[0])) or real(*args))
        monkeypatch.setattr(Block, "forward", None)  # nobody calls it
        return ran

    return turn_on


@pytest.mark.parametrize("name", list(CASES))
def test_in_float32_it_is_the_same_step(name, fused):
    options, batches = CASES[name]
    want, _ = trained(options, batches)
    ran = fused()
    got, _ = trained(options, batches)
    assert set(ran) == {4, 2}  # encoder and predictor
    for n, (a, b) in enumerate(zip(got, want, strict=True)):
        assert (a - b).abs().max() <= 2e-4 * b.abs().max() + 1e-7, f"tensor {n}"


def test_in_bfloat16_features_are_stored_in_it(fused):
    """No float32 copies: of the target's features and of all that the encoder and the predictor return."""
    options, batches = {"runtime": {"capacity_quantum": 16, "dtype": "bfloat16"}}, [batch()]
    exact, _ = trained({"runtime": {"capacity_quantum": 16}}, batches)
    plain, _ = trained(options, batches, torch.bfloat16)
    fused()
    got, state = trained(options, batches, torch.bfloat16)
    features = [*state.h, *state.z[0], *state.z_pred[0], *state.z_context[0]]
    assert {x.dtype for x in features} == {torch.bfloat16}
    off, allowed = (sum((a - b).norm() for a, b in zip(side, exact)) for side in (got, plain))
    assert off <= 2 * allowed


def test_a_choice_that_cannot_be_had_stops_before_anything_is_read():
    for build in (check, TrainStep):
        with pytest.raises(Exception, match="runtime.epilogues: triton is not supported here: it needs CUDA"):
            build(config(runtime={"epilogues": "triton"}))
    assert all(b.epilogues is False for b in TrainStep(config(runtime={"epilogues": False})).encoder.blocks)
