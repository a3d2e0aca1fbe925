"""Streams of fixed capacity (``runtime.capacity_quantum``): more room for the masks changes no loss and no weight."""

import dataclasses
import math

import pytest
import torch

from vjepa_fast.config import from_dict, schema, to_dict
from vjepa_fast.errors import ConfigError
from vjepa_fast.layers import block, packed
from vjepa_fast.masks import drawn
from vjepa_fast.metrics import flops
from vjepa_fast.models import vit
from vjepa_fast.trainer import capacity
from vjepa_fast.trainer import step as stepping
from vjepa_fast.trainer.step import TrainStep

from .conftest import batch, config
from .test_packed import EVERY_TERM

ROOMS = (1.0, 1.1, 2.0)
VARIANTS = {
    "pred": {"loss_exp": 1.5},
    "context": {"coeff": 0.5, "warmup": [0, 0]},
    "fwm_static": {"normalize": True},
    "fwm_orth": {"normalize": True, "split": "channel"},
    "ld": {"hard_weighting": 1.0, "hard_scope": "sample"},
    "hamiltonian": {"loss_exp": 2.0},
    "sigreg": {"num_slices": 8},
}
ONLINE = {"objectives": {"pred": {}, "hw": {}, "kinematic": {}, "delta": {}}, "target": {"mode": "online"}}
CASES = {
    "every term": ({"objectives": EVERY_TERM}, [batch(1, frames=(8,))]),
    "variants": ({"objectives": VARIANTS}, [batch(1, frames=(8,))]),
    "published": ({"objectives": EVERY_TERM, "compat": "published"}, [batch(1, frames=(8,))]),
    "online": (ONLINE, [batch(1, frames=(8,))]),
    "two lengths": ({"objectives": EVERY_TERM, "data": {"dataset_fpcs": (4, 8)}}, [batch(1, frames=(4, 8))]),
    "images": ({"objectives": EVERY_TERM}, [batch(1), batch(1, frames=(1,), modality="image")]),
    "accumulation": ({}, [batch(1, first=3 * n) for n in range(2)]),
    "gated, no rotary positions": ({"model": {"use_silu": True, "use_rope": False, "pred_use_silu": True}}, [batch()]),
    "checkpointing, clipping": (
        {"model": {"use_activation_checkpointing": True}, "optimization": {"clip_grad": 0.1}},
        [batch()],
    ),
}


def make(monkeypatch, options, room=None, double=False):
    """A step whose streams have ``room`` times the rows of their tokens; None: exact lengths."""
    masks = {"truncate": options.get("truncate", "batch")}
    options = {k: v for k, v in options.items() if k != "truncate"}
    step = TrainStep(config(masks=masks, **options, runtime={"capacity_quantum": 0 if room is None else 1}))
    if double:
        for module in (step.encoder, step.predictor, step.plan, step.target_encoder):
            module.double()

    def stream(masks, lengths=None, quantum=None):
        sides = zip((masks.enc, masks.pred), (masks.enc_len, masks.pred_len), masks.host_lengths(lengths))
        rows = ((*side, math.ceil(room * sum(map(sum, side[2])))) for side in sides)
        return [packed.Stream.cut(*x[:3], masks.enc.shape[2], x[3], x[3]) for x in rows]

    monkeypatch.setattr(drawn, "stream", stream)
    return step


def trained(step, batches, steps=2):
    """Losses and gradients of ``steps`` steps, and the weights after them."""
    outs, grads = [], []
    for i in range(steps):
        out = step(batches, i)
        outs += [out.loss, *out.terms.values(), out.grad_norm]
        grads += [p.grad for p in step.params]
    return outs, grads, step.params


def near(ours, theirs, tolerance):
    """Within ``tolerance`` of the largest number of each tensor."""
    for mine, other in zip(ours, theirs, strict=True):
        for a, b in zip(mine, other, strict=True):
            assert (a is None) == (b is None)
            if a is not None:
                assert float((a - b).detach().abs().max()) <= tolerance * max(1e-12, float(b.detach().abs().max()))


def same(ours, theirs):
    return all(a is b or torch.equal(a, b) for mine, other in zip(ours, theirs) for a, b in zip(mine, other))


PAIRS = [
    *(("every term", t) for t in schema.TRUNCATE),
    ("two lengths", "batch"),
    ("images", "none"),
    *((case, t) for case, t in zip(CASES, ("none", "batch") * len(CASES)) if case != "every term"),
]


@pytest.mark.parametrize(("case", "truncate"), PAIRS)
def test_capacity_changes_no_loss_gradient_or_weight(case, truncate, monkeypatch):
    """In double precision; the second step is one with the weights of the first."""
    options, batches = CASES[case]
    options = {**options, "truncate": truncate}
    exact = trained(make(monkeypatch, options, double=True), batches)
    for room in ROOMS if case == "every term" else ROOMS[-1:]:
        near(trained(make(monkeypatch, options, room, double=True), batches), exact, 1e-9)


@pytest.mark.parametrize("truncate", schema.TRUNCATE)
def test_in_single_precision_nothing_depends_on_the_room(truncate, monkeypatch):
    """With the CPU's own kernels. Weights are not looked at: a first AdamW step makes much of a tiny gradient."""
    options, batches = CASES["every term"]
    options = {**options, "truncate": truncate}
    exact, *others = (trained(make(monkeypatch, options, room), batches, 1)[:2] for room in (None, *ROOMS))
    for outs, grads in others:
        near([outs], exact[:1], 1e-6)
        near([grads], exact[1:], 1e-5)


def spoiled(x, mask):
    """NaN in the rows of filler; what gradient comes back to them goes on to where ``x`` comes from."""
    return x + torch.zeros_like(x).masked_fill(~mask.real[..., None], math.nan)


def spoil_inputs(monkeypatch, step):
    """Embedded tokens of the encoder and of the predictor."""
    embed = vit.VisionTransformer._embed
    now = []

    def embedded(self, clip, grid, idx, place=None):
        x = embed(self, clip, grid, idx, place)
        return x if place is None else spoiled(x, now[0])

    def forward(self, clip, masks=None, hierarchical=True, plain=vit.VisionTransformer.forward):
        now[:] = masks or []
        return plain(self, clip, masks, hierarchical)

    monkeypatch.setattr(vit.VisionTransformer, "_embed", embedded)
    monkeypatch.setattr(vit.VisionTransformer, "forward", forward)
    step.predictor.predictor_embed.register_forward_hook(lambda module, args, x: spoiled(x, now[0]))


def spoil_outputs(monkeypatch, step):
    """All features that the losses read."""
    context = TrainStep._context

    def features(self, clip, enc, pred, modality):
        z, z_pred, z_context = context(self, clip, enc, pred, modality)
        return (*([spoiled(x[0], m[0])] for x, m in ((z, enc), (z_pred, pred), (z_context, enc))),)

    monkeypatch.setattr(TrainStep, "_context", features)


@pytest.mark.parametrize(
    ("case", "spoil", "double"),  # every pair of them
    [
        ("every term", spoil_inputs, True),
        ("every term", spoil_outputs, False),
        ("variants", spoil_inputs, False),
        ("variants", spoil_outputs, True),
    ],
)
def test_what_filler_holds_reaches_no_weight(case, spoil, double, monkeypatch):
    options, batches = CASES[case]
    clean = trained(make(monkeypatch, options, 2.0, double), batches)
    step = make(monkeypatch, options, 2.0, double)
    spoil(monkeypatch, step)
    assert same(trained(step, batches), clean)


@pytest.mark.parametrize("attention", ["auto", "sdpa"])
def test_hidden_states_of_filler_reach_no_loss(attention, monkeypatch):
    """Forward only: backward, a weight's gradient is a sum over all rows, and they are finite for that reason."""
    step = make(monkeypatch, {"objectives": EVERY_TERM}, 2.0)
    stepping.use_attention(attention, step.device, step.dtype, step.encoder, step.predictor)
    with torch.no_grad():
        clean = step.plan(step.forward(batch(), 0))
        run = block.run_block

        def poisoned(module, x, table, recompute, lengths=None):
            if lengths is not None:
                x = torch.where(torch.arange(x.shape[1])[:, None] < int(lengths.sizes[:6].sum()), x, math.nan)
            return run(module, x, table, recompute, lengths)

        monkeypatch.setattr(block, "run_block", poisoned)
        assert len(step.forward(batch(), 0).masks_enc[0][0].sizes) == 6  # two masks of three samples
        dirty = step.plan(step.forward(batch(), 0))
    assert torch.isfinite(dirty.total) and same([dirty.terms.values()], [clean.terms.values()])


class Unknown(tuple):
    """Lengths that are not known to the host."""

    def __iter__(self):
        raise AssertionError("a length was read on the host")

    __getitem__ = __len__ = __iter__


@pytest.mark.parametrize("case", ["every term", "variants", "online", "gated, no rotary positions"])
def test_no_length_is_read_on_the_host(case, monkeypatch):
    options, batches = CASES[case]
    want = trained(make(monkeypatch, options, 1.1), batches)
    step = make(monkeypatch, options, 1.1)
    cut = drawn.stream

    def hidden(*args):
        return [dataclasses.replace(m, lengths=Unknown(m.lengths)) for m in cut(*args)]

    monkeypatch.setattr(drawn, "stream", hidden)
    monkeypatch.setattr(flops, "of_state", lambda *args, **kwargs: flops.Work())  # counts by them, off the device
    assert same(trained(step, batches), want)


def test_shapes_are_those_of_the_quantum(monkeypatch):
    """Six sets of lengths, and two capacities of the encoder's stream and one of the predictor's."""
    shapes, lengths = set(), set()
    step = TrainStep(config(masks={"truncate": "none"}, runtime={"capacity_quantum": 96}))
    run = block.run_block

    def spy(module, x, table, recompute, lengths=None):
        if lengths is not None:
            shapes.add((tuple(x.shape), tuple(lengths.sizes.shape), lengths.longest))
        return run(module, x, table, recompute, lengths)

    monkeypatch.setattr(block, "run_block", spy)
    for i in range(6):
        state = step.forward(batch(i), i)
        lengths.add(state.masks_enc[0][0].lengths)
        assert state.z[0][0].shape[1] % 96 == state.z_pred[0][0].shape[1] % 96 == 0
    assert len(lengths) == 6 and len(shapes) == 3


def test_the_work_of_a_step_and_its_monitors_are_those_of_its_tokens(monkeypatch):
    exact, roomy = (make(monkeypatch, {"truncate": "none"}, room) for room in (None, 2.0))
    a, b = (step(batch(), 0, monitor=True) for step in (exact, roomy))
    assert a.work == b.work and a.monitors.keys() == b.monitors.keys()
    for name, value in a.monitors.items():
        torch.testing.assert_close(b.monitors[name], value, rtol=1e-4, atol=1e-6, equal_nan=True)


def test_bfloat16(monkeypatch):
    low = TrainStep(config(runtime={"capacity_quantum": 64}), dtype=torch.bfloat16)(batch(), 0)
    full = TrainStep(config())(batch(), 0)
    assert abs(float(low.loss) / float(full.loss) - 1) < 0.02


# -- the key ----------------------------------------------------------------------------------------------------------
def resolved(device="cpu", dtype=torch.float32, **runtime):
    step = TrainStep(config(model={"pred_embed_dim": 48}))  # varlen takes heads of 8 n channels
    return capacity.quantum(config(runtime=runtime), torch.device(device), dtype, step.encoder, step.predictor)


def test_auto_is_exact_on_a_cpu_and_a_sixteenth_on_cuda_where_attention_can(caplog):
    assert resolved() == 0 and resolved(capacity_quantum=48) == 48
    assert resolved("cuda", torch.bfloat16) is None and resolved("cuda", torch.bfloat16, attention="varlen") is None
    assert not caplog.records
    assert resolved("cuda") == 0  # float32
    assert "runtime.capacity_quantum: auto is 0" in caplog.text and "varlen: it takes bfloat16" in caplog.text
    assert resolved("cuda", torch.bfloat16, attention="xformers") == 0
    masks = TrainStep(config()).sampler.draw(batch().groups[0].clip, step=0, first_sample=0)
    (enc,), (pred,) = masks.wait(None)
    assert enc.shape[1] % 12 == pred.shape[1] % 12 == 0 and enc.spare == 12  # a 16th of 2 masks x 3 clips x 32 tokens


def test_a_backend_that_needs_lengths_on_the_host_is_refused():
    with pytest.raises(ConfigError, match="runtime.attention: xformers .*capacity_quantum=0"):
        resolved("cuda", torch.bfloat16, attention="xformers", capacity_quantum=64)


def test_the_former_name_still_works():
    assert resolved(pad_to_multiple=64) == 64 == resolved(pad_to_multiple=64, capacity_quantum=64)
    both = config(runtime={"pad_to_multiple": 64, "capacity_quantum": 32})
    with pytest.raises(ConfigError, match="runtime.pad_to_multiple: 64 .*runtime.capacity_quantum"):
        from_dict(to_dict(both))
    assert "capacity_quantum" not in to_dict(config())["runtime"]  # folders from before still match
    saved = to_dict(config(runtime={"pad_to_multiple": 64}))
    assert from_dict(saved).runtime.pad_to_multiple == 64


@pytest.mark.parametrize("value", [-1, "most", 0.5])
def test_other_values_are_refused(value):
    values = to_dict(config())
    values["runtime"]["capacity_quantum"] = value
    with pytest.raises(ConfigError, match="runtime.capacity_quantum: "):
        from_dict(values)


def test_overlapping_masks_are_refused(monkeypatch):
    """A sample has no more tokens than its grid: longer segments than that are not provided for."""
    step = TrainStep(config(runtime={"capacity_quantum": 8}))
    sample = step.sampler.sample

    def everything(*args, **kwargs):
        masks = sample(*args, **kwargs)
        enc, lengths = torch.arange(32).expand_as(masks.enc), torch.full_like(masks.enc_len, 32)
        return dataclasses.replace(masks, enc=enc, enc_len=lengths)

    monkeypatch.setattr(step.sampler, "sample", everything)
    with pytest.raises(ConfigError, match=r"masks.specs\[0\]: .*overlap.*runtime.capacity_quantum=0"):
        step(batch(), 0)
