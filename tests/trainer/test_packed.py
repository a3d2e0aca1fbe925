"""Steps that keep all tokens of every sample (masks.truncate: none)."""

import dataclasses

import pytest
import torch
from torch._dynamo.utils import counters

from vjepa_fast.config import schema
from vjepa_fast.trainer import regional
from vjepa_fast.trainer.step import TrainStep

from .conftest import batch, config

NONE = {"masks": {"truncate": "none"}}
EVERY_TERM = {
    "pred": {},
    "hw": {},
    "context": {"coeff": 0.5, "warmup": [0, 0], "weight_distance": True},
    "fwm_static": {"coeff": 0.05},
    "fwm_orth": {"coeff": 0.01},
    "ld": {"channels": "dynamics", "hard_weighting": 1.0},
    "delta": {},
    "ltc": {},
    "spectral": {},
    "ac": {},
    "velgate": {},
    "hamiltonian": {},
    "sigreg": {"num_slices": 8},
    "pixels": {},
}


def one_sample(whole, b):
    g = whole.groups[0]
    part = dataclasses.replace(
        g,
        clip=g.clip[b : b + 1],
        labels=g.labels[b : b + 1],
        dataset=g.dataset[b : b + 1],
        paths=g.paths[b : b + 1],
        first_sample=g.first_sample + b,
    )
    return dataclasses.replace(whole, groups=[part])


def gradients(step, total):
    total.backward()
    found = [torch.zeros_like(p) if p.grad is None else p.grad for p in step.params]
    step.optimizer.zero_grad(set_to_none=True)
    return found


def test_no_token_is_left_out():
    """The truncated batch has fewer; here context and prediction of every sample fill its grid."""
    kept, cut = TrainStep(config(**NONE)), TrainStep(config())
    fewer = 0
    for i in range(4):
        full, short = kept.forward(batch(i), i), cut.forward(batch(i), i)
        for enc, pred, z, z_pred, dense in zip(
            full.masks_enc[0], full.masks_pred[0], full.z[0], full.z_pred[0], short.masks_enc[0], strict=True
        ):
            assert [e + p for e, p in zip(enc.lengths, pred.lengths)] == [32] * 3
            assert z.shape == (1, sum(enc.lengths), 192) and z_pred.shape == (1, sum(pred.lengths), 192)
            fewer += sum(enc.lengths) - dense.numel()
    assert fewer > 0


@pytest.mark.parametrize("compat", ["intended", "published"])
@pytest.mark.parametrize("frames", [4, 8])
def test_one_sample_gives_the_bits_of_truncate_batch(compat, frames):
    options = {"objectives": EVERY_TERM, "compat": compat, "data": {"dataset_fpcs": (frames,)}}
    a, b = TrainStep(config(**NONE, **options)), TrainStep(config(**options))
    for i in range(3):
        data = batch(i, size=1, frames=(frames,))
        ours, theirs = a(data, i), b(data, i)
        assert torch.equal(ours.loss, theirs.loss)
        assert all(torch.equal(v, theirs.terms[k]) for k, v in ours.terms.items())
    assert all(torch.equal(p, q) for p, q in zip(a.params, b.params))


def test_a_batch_is_the_weighted_mean_of_its_samples():
    """Loss and gradients of the whole step: each sample counts by its predicted tokens."""
    specs = (schema.MaskConfig(num_blocks=3, spatial_scale=(0.3, 0.3)),)
    options = {"masks": {"specs": specs, "truncate": "none"}, "objectives": {"pred": {}, "hw": {}}}
    step = TrainStep(config(**options))
    whole = batch(1, size=4)
    state = step.forward(whole, 0)
    loss = step.plan(state).total
    ours = gradients(step, loss)
    lengths = state.masks_pred[0][0].lengths
    assert len(set(lengths)) > 1
    total, theirs = 0.0, [torch.zeros_like(p) for p in step.params]
    for b, length in enumerate(lengths):
        single = step.forward(one_sample(whole, b), 0)
        assert single.masks_pred[0][0].lengths == (length,)
        value = step.plan(single).total * (length / sum(lengths))
        total += float(value.detach())
        theirs = [g + h for g, h in zip(theirs, gradients(step, value))]
    assert float(loss.detach()) == pytest.approx(total, rel=1e-6)
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)


def test_training_lowers_the_loss():
    step = TrainStep(config(**NONE, optimization={"epochs": 10, "ipe": 4, "lr": 2e-3}))
    losses = [float(step(batch(0, size=4), i).terms["pred"]) for i in range(30)]
    assert sum(losses[-5:]) < 0.96 * sum(losses[:5])


def test_clips_of_several_lengths_images_and_micro_batches():
    step = TrainStep(config(**NONE, data={"dataset_fpcs": (4, 8)}, objectives=EVERY_TERM))
    mixed = batch(frames=(4, 8))
    assert torch.isfinite(step(mixed, 0).loss)
    state = step.forward(mixed, 1)
    assert [m.tokens for masks in state.masks_enc for m in masks] == [32, 32, 64, 64]
    assert torch.isfinite(step([batch(1), batch(1, frames=(1,), modality="image")], 1, monitor=True).loss)


def test_bfloat16_and_activation_checkpointing():
    full = TrainStep(config(**NONE))(batch(), 0)
    low = TrainStep(config(**NONE), dtype=torch.bfloat16)(batch(), 0)
    again = TrainStep(config(**NONE, model={"use_activation_checkpointing": True}))(batch(), 0)
    assert abs(float(low.loss) / float(full.loss) - 1) < 0.02
    assert torch.equal(again.loss, full.loss) and torch.equal(again.grad_norm, full.grad_norm)


@pytest.mark.parametrize("quantum", [0, 64])
def test_compiled_blocks_are_not_compiled_again_for_other_lengths(quantum):
    options = {**NONE, "objectives": {"pred": {}, "hw": {}}, "runtime": {"capacity_quantum": quantum}}
    plain, compiled = TrainStep(config(**options)), TrainStep(config(**options))
    torch._dynamo.reset()
    regional.compile_models(
        "blocks", compiled.encoder, compiled.predictor, compiled.target, steady=False, backend="aot_eager"
    )
    graphs, lengths = [], set()
    for i in range(6):
        data = batch(i, size=3 + i % 2)  # another number of segments is no other graph either
        torch.testing.assert_close(compiled(data, i).loss, plain(data, i).loss, rtol=1e-5, atol=0)
        graphs.append(counters["stats"]["unique_graphs"])
        lengths.add(plain.forward(data, i).masks_enc[0][0].lengths)
    assert len(lengths) == 6 and graphs[0] > 0
    assert graphs[-1] - graphs[0] <= 1  # segments of one length come back from the attention in another layout
