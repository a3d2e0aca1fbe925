"""One step: against the same step written out by hand, and what each mode of the target does."""

import copy
import dataclasses
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from vjepa_fast import models, objectives, ops
from vjepa_fast.config import schema
from vjepa_fast.errors import CheckpointError, ConfigError
from vjepa_fast.metrics import flops
from vjepa_fast.reference import build_reference
from vjepa_fast.trainer.schedules import Schedules
from vjepa_fast.trainer.step import TrainStep, resolve_device

from .conftest import batch, config


def weights(step: TrainStep) -> dict[str, torch.Tensor]:
    named = {"encoder": step.encoder, "predictor": step.predictor, "target": step.target_encoder, "heads": step.plan}
    return {f"{n}.{k}": v.detach().clone() for n, m in named.items() for k, v in m.state_dict().items()}


def by_hand(cfg, batches):
    """Two losses and the final weights, from the definition: no shared code but models, terms and masks."""
    torch.manual_seed(cfg.seed)
    encoder, predictor = models.build_from_config(cfg)
    target = copy.deepcopy(encoder)
    plan = objectives.build_objectives(cfg.objectives, levels=4, embed_dim=48, seed=cfg.seed)
    sampler = TrainStep(cfg).sampler
    named = [*encoder.named_parameters(), *predictor.named_parameters(), *plan.named_parameters()]
    trained = [(k, p) for k, p in named if p.requires_grad]
    decayed = [p for k, p in trained if p.ndim > 1 and "bias" not in k]
    plain = [p for k, p in trained if not (p.ndim > 1 and "bias" not in k)]
    o, losses = cfg.optimization, []
    moments = {p: (torch.zeros_like(p), torch.zeros_like(p)) for _, p in trained}
    for i, b in enumerate(batches):
        raw = b.groups[0].clip
        mean, std = (torch.tensor(v).view(1, 3, 1, 1, 1) for v in (cfg.data_aug.mean, cfg.data_aug.std))
        clip = (raw.float() / 255 - mean) / std
        enc, pred = sampler(raw, step=i, first_sample=0)
        with torch.no_grad():
            h = torch.cat([F.layer_norm(x, (48,)) for x in target(clip).split(48, -1)], -1)
        z = [encoder(clip, masks=m) for m in enc]
        out = [predictor(z[j], enc[j], pred[j], mask_index=j) for j in range(len(enc))]
        loss = plan(
            objectives.LatentState(
                grids=[(2, 4, 4)],
                clips=[clip],
                h=[h],
                z=[z],
                z_pred=[[p for p, _ in out]],
                z_context=[[c for _, c in out]],
                masks_enc=[enc],
                masks_pred=[pred],
                step=i,
                total_steps=12,
                epoch=0,
                epochs=3,
            )
        ).total
        grads = torch.autograd.grad(loss, [p for _, p in trained], allow_unused=True)
        losses.append(loss.item())
        lr = (
            o.start_lr + (o.lr - o.start_lr) * (i + 1) / 2
            if i + 1 < 2
            else o.final_lr
            + (o.lr - o.final_lr) * 0.5 * (1 + torch.cos(torch.tensor(torch.pi * (i + 1 - 2) / 10)).item())
        )
        with torch.no_grad():
            for (_, p), g in zip(trained, grads):
                if g is None:
                    continue
                m, v = moments[p]
                m.lerp_(g, 1 - o.betas[0])
                v.mul_(o.betas[1]).add_((1 - o.betas[1]) * g * g)
                if any(p is q for q in decayed):
                    p.mul_(1 - lr * o.weight_decay)
                p.sub_(lr * m / (1 - o.betas[0] ** (i + 1)) / ((v / (1 - o.betas[1] ** (i + 1))).sqrt() + o.eps))
            momentum = 0.9 + 0.1 * i / 12
            for t, s in zip(target.parameters(), encoder.parameters()):
                t.mul_(momentum).add_(s * (1 - momentum))
    assert plain and decayed
    return losses, (encoder, predictor, target, plan)


def test_steps_equal_the_same_steps_written_out():
    cfg = config()
    batches = [batch(i) for i in range(3)]
    step = TrainStep(cfg)
    outs = [step(b, i) for i, b in enumerate(batches)]
    losses, modules = by_hand(cfg, batches)
    torch.testing.assert_close([float(o.loss) for o in outs], losses, rtol=1e-5, atol=0)
    for mine, hand in zip((step.encoder, step.predictor, step.target_encoder, step.plan), modules):
        for (k, a), b in zip(mine.state_dict().items(), hand.state_dict().values()):
            torch.testing.assert_close(a, b, rtol=1e-3, atol=2e-6, msg=lambda m, k=k: f"{k}: {m}")
    assert set(outs[0].terms) == {"pred", "context", "ld"}
    total = sum(float(outs[0].terms[k]) * w for k, w in (("pred", 1), ("context", 0.5), ("ld", 1)))
    assert abs(total - float(outs[0].loss)) < 1e-5
    assert outs[1].lr == Schedules.from_config(cfg).lr(1) and outs[0].momentum == 0.9


def paired(cfg):
    """Our step and the reference's with the same weights."""
    step, o = TrainStep(cfg), cfg.optimization
    reference = build_reference(
        crop_size=32,
        patch_size=8,
        num_frames=4,
        embed_dim=48,
        depth=4,
        num_heads=2,
        pred_embed_dim=24,
        pred_depth=2,
        pred_num_heads=2,
        objectives=cfg.objectives,
        ld_grad=cfg.compat == "intended",
        epochs=o.epochs,
        ipe=o.ipe,
        lr=o.lr,
        start_lr=o.start_lr,
        final_lr=o.final_lr,
        warmup=o.warmup,
        ema=cfg.target.ema,
        eps=o.eps,
        disable_ema=cfg.target.mode == "online",
        mask_index=0 if step.shared_token else None,
    )
    reference.encoder.load_state_dict(step.encoder.state_dict())
    reference.target_encoder.load_state_dict(step.encoder.state_dict())
    reference.predictor.load_state_dict(step.predictor.state_dict())
    reference.losses.load_state_dict(step.plan.state_dict())
    return step, reference


HEADLINE = {
    "pred": {},
    "hw": {},
    "context": {"coeff": 0.5, "warmup": [0, 4], "weight_distance": True},
    "fwm_static": {"coeff": 0.05},
    "fwm_orth": {"coeff": 0.01},
    "ld": {"channels": "dynamics", "hard_weighting": 1.0},
}


@pytest.mark.parametrize(
    "sections",
    [
        {},
        {"objectives": HEADLINE},
        {"objectives": HEADLINE, "compat": "published"},
        {"objectives": {"pred": {}, "kinematic": {}}, "compat": "published", "target": {"mode": "online"}},
        {"model": {"mask_token_index": "zero"}},
    ],
)
def test_steps_equal_the_references(sections):
    """Whole steps of the published algorithm: losses, gradients' effect (AdamW), schedules and EMA, three in a row."""
    step, reference = paired(config(optimization={"eps": 1e-2}, **sections))  # Adam's eps turns rounding into steps
    pairs = (
        (step.encoder, reference.encoder),
        (step.target_encoder, reference.target_encoder),
        (step.predictor, reference.predictor),
        (step.plan, reference.losses),
    )
    before = [{k: v.clone() for k, v in mine.state_dict().items()} for mine, _ in pairs]
    for i in range(3):
        b = batch(i, frames=(4,))
        masks_enc, masks_pred = step.sampler(b.groups[0].clip, step=i, first_sample=0)
        theirs = reference([b.groups[0].clip], [masks_enc], [masks_pred])
        ours = step(b, i)
        torch.testing.assert_close(float(ours.loss), theirs["loss"], rtol=2e-5, atol=0)
        for name, value in theirs["terms"].items():
            assert float(ours.terms[name]) == pytest.approx(value, rel=5e-5, abs=1e-7), name
        assert {k: float(w) for k, w in ours.weights.items()} == pytest.approx(theirs["weights"])
        assert (ours.lr, ours.weight_decay) == pytest.approx((theirs["lr"], theirs["wd"]))
    for (mine, other), start in zip(pairs, before):
        theirs = other.state_dict()
        for key, value in mine.state_dict().items():
            moved = (theirs[key] - start[key]).norm()
            assert (value - theirs[key]).norm() <= 1e-3 * moved + 1e-6, key


def test_ema_target_moves_after_the_optimiser_and_by_the_momentum():
    step = TrainStep(config(target={"ema": (0.75, 0.75)}))
    before = {k: v.clone() for k, v in step.target_encoder.state_dict().items()}
    step(batch(), 0)
    for key, value in step.target_encoder.state_dict().items():
        expected = 0.75 * before[key] + 0.25 * step.encoder.state_dict()[key]
        torch.testing.assert_close(value, expected, rtol=1e-5, atol=1e-7)
    assert all(p.grad is None for p in step.target_encoder.parameters())


def test_every_parameter_is_in_the_optimiser_once_and_heads_are_trained():
    step = TrainStep(config())
    params = [id(p) for p in step.params]
    owned = [p for m in (step.encoder, step.predictor, step.plan) for p in m.parameters() if p.requires_grad]
    assert len(params) == len(set(params)) and set(params) == {id(p) for p in owned}
    before = weights(step)
    step(batch(), 0)
    moved = {k for k, v in weights(step).items() if not torch.equal(v, before[k])}
    assert {"heads.heads.ld.0.weight", "heads.heads.ld.2.bias", "predictor.mask_tokens.0"} <= moved
    groups = {(g["name"], g["WD_exclude"]): g["weight_decay"] for g in step.optimizer.param_groups}
    assert len(groups) == 6 and all((w == 0) == excluded for (_, excluded), w in groups.items())


def rows_of(whole, rows, step, first):
    g = whole.groups[0]
    part = dataclasses.replace(
        g, clip=g.clip[rows], labels=g.labels[rows], dataset=g.dataset[rows], paths=g.paths[rows], first_sample=first
    )
    return dataclasses.replace(whole, groups=[part], step=step)


def test_accumulation_equals_one_larger_batch():
    """With the same masks for every sample, so that truncation, which is by batch, does nothing."""
    both = batch(size=4)
    whole, parts = TrainStep(config()), TrainStep(config())
    fixed = whole.sampler(both.groups[0].clip[:1], step=0, first_sample=0)

    def draw(clip, **_):
        masks = tuple([m.expand(clip.shape[0], -1) for m in side] for side in fixed)
        return SimpleNamespace(wait=lambda quantum: masks)

    whole.sampler = parts.sampler = SimpleNamespace(draw=draw)
    a, b = whole(both, 0), parts([rows_of(both, slice(0, 2), 0, 0), rows_of(both, slice(2, 4), 1, 2)], 0)
    torch.testing.assert_close(a.loss, b.loss)
    torch.testing.assert_close(a.terms, b.terms)
    torch.testing.assert_close(a.grad_norm, b.grad_norm)
    torch.testing.assert_close([p.grad for p in whole.params], [p.grad for p in parts.params], rtol=1e-4, atol=1e-7)
    assert a.clips == b.clips == 4 and a.paths == b.paths


def test_accumulation_equals_one_larger_batch_masks_included():
    """Masks are keyed by step and global sample; one block of one size leaves nothing to truncate."""
    specs = (schema.MaskConfig(num_blocks=1, spatial_scale=(0.3, 0.6)),)
    whole, parts = (TrainStep(config(masks={"specs": specs})) for _ in range(2))
    for i in range(3):
        both = batch(i, size=4, first=4 * i)
        halves = [rows_of(both, slice(0, 2), 2 * i, 4 * i), rows_of(both, slice(2, 4), 2 * i + 1, 4 * i + 2)]
        torch.testing.assert_close(whole(both, i).loss, parts(halves, i).loss, rtol=1e-5, atol=0)


def test_gradient_clipping():
    free, held = TrainStep(config()), TrainStep(config(optimization={"clip_grad": 0.01}))
    a, b = free(batch(), 0), held(batch(), 0)
    torch.testing.assert_close(a.grad_norm, b.grad_norm)  # what is told is the norm before clipping
    moments = [held.optimizer.state[p]["exp_avg"].flatten() for p in held.params if p.grad is not None]
    norm = torch.linalg.vector_norm(torch.cat(moments)) / (1 - 0.9)  # of the gradients that were averaged
    assert abs(float(norm) - 0.01) < 1e-4 < float(a.grad_norm)


def test_online_target_intended():
    cfg = config(target={"mode": "online"}, objectives={"pred": {}, "kinematic": {}})
    step = TrainStep(cfg)
    assert step.target_encoder is step.encoder and step.target_grad
    state = step.forward(batch(), 0)
    assert state.h[0].requires_grad
    torch.testing.assert_close(state.h[0], ops.target_norm(step.encoder(state.clips[0]), 4))
    before = weights(step)
    step(batch(), 0)
    after = weights(step)
    assert not torch.equal(after["encoder.blocks.0.attn.qkv.weight"], before["encoder.blocks.0.attn.qkv.weight"])
    assert all(torch.equal(after[k], after["encoder." + k[7:]]) for k in after if k.startswith("target."))
    saved = step.state_dict()
    assert all(torch.equal(v, saved["encoder"][k]) for k, v in saved["target_encoder"].items())


def test_online_target_without_a_term_that_needs_its_gradient_is_not_differentiated():
    step = TrainStep(config(target={"mode": "online"}, objectives={"pred": {}}))
    assert not step.target_grad and not step.forward(batch(), 0).h[0].requires_grad
    assert TrainStep(config(target={"mode": "online", "stop_gradient": False}, objectives={"pred": {}})).target_grad


PIXELS = {"objectives": {"pixels": {}}, "model": {"predict_all": False}}


@pytest.mark.parametrize("mode", ["online", "ema"])
def test_no_target_forward_where_no_term_reads_it(mode, monkeypatch):
    """A masked autoencoder: the same losses whatever the target would say; it runs for the monitors alone."""
    step = TrainStep(config(target={"mode": mode, "stop_gradient": False}, **PIXELS))
    beside = TrainStep(config(objectives={"pixels": {}, "pred": {"coeff": 0.0}}, model={"predict_all": False}))
    runs = []
    whole = step._target_forward
    monkeypatch.setattr(step, "_target_forward", lambda clip: runs.append(1) or whole(clip))
    assert not step.target_grad and not step.forward(batch(), 0).has("h")
    outs = [[s(batch(i), i) for i in range(2)] for s in (step, beside)]
    assert not runs and all(torch.equal(a.terms["pixels"], b.terms["pixels"]) for a, b in zip(*outs))
    target_flops = flops.step_cost(step.dims, [flops.Clips(3, 32, [])])["target"].flops
    assert outs[1][0].work.flops - outs[0][0].work.flops == target_flops > 0
    assert outs[1][0].work.tokens - outs[0][0].work.tokens == 3 * 32
    assert float(step(batch(2), 2, monitor=True).monitors["rankme"]) > 1 and runs == [1]


@pytest.mark.parametrize(
    "sections",
    [
        {"runtime": {"capacity_quantum": 16}, "data": {"dataset_fpcs": (4, 8)}},
        {"masks": {"truncate": "none"}},
        {"model": {"use_activation_checkpointing": True, "predict_all": False}},
        {"optimization": {"accumulate": 2}},
    ],
)
def test_pixels_are_learnt_alone(sections):
    """The head and the encoder under it, with streams, several lengths, images, recomputation, two batches a step."""
    sections = {**PIXELS, **sections, "target": {"mode": "online"}}
    sections["optimization"] = {"start_lr": 3e-3, "lr": 3e-3, **sections.get("optimization", {})}
    step = TrainStep(config(**sections))
    frames = step.cfg.data.dataset_fpcs
    data = [batch(frames=frames), batch(frames=(1,), modality="image", first=6)]
    losses = [float(step(data, 0).loss) for _ in range(12)]
    assert losses[-1] < 0.99 * losses[0]


def test_online_target_published_saves_a_target_frozen_at_initialisation():
    step = TrainStep(config(target={"mode": "online"}, compat="published", objectives={"pred": {}}))
    before = weights(step)
    for i in range(2):
        step(batch(i), i)
    after = weights(step)
    frozen = [k for k in after if k.startswith("target.")]
    assert all(torch.equal(after[k], before[k]) for k in frozen)
    assert any(not torch.equal(after["encoder." + k[7:]], after[k]) for k in frozen)
    assert step.forward(batch(), 0).h[0].requires_grad  # as published, nothing is detached


def test_groups_of_different_length_and_images():
    step = TrainStep(config(data={"dataset_fpcs": (4, 8)}))
    out = step(batch(frames=(4, 8)), 0)
    assert torch.isfinite(out.loss) and out.clips == 6 and len(out.paths) == 6
    state = step.forward(batch(frames=(4, 8)), 0)
    assert state.grids == [(2, 4, 4), (4, 4, 4)] and state.modality == "video"
    image = step.forward(batch(frames=(1,), modality="image"), 0)
    assert image.grids == [(1, 4, 4)] and image.modality == "image"
    assert torch.isfinite(step([batch(0), batch(0, frames=(1,), modality="image")], 1).loss)


def test_bfloat16_is_autocast_of_the_models_only():
    step = TrainStep(config(), dtype=torch.bfloat16)
    reference = TrainStep(config())
    state = step.forward(batch(), 0)
    assert state.z_pred[0][0].dtype == torch.bfloat16
    assert {p.dtype for p in step.params} == {torch.float32}
    out, full = step(batch(), 0), reference(batch(), 0)
    assert out.loss.dtype == torch.float32
    assert abs(float(out.loss) / float(full.loss) - 1) < 0.02
    assert all(p.grad is not None for p in step.encoder.blocks.parameters())


def test_online_bfloat16_keeps_the_encoders_gradient():
    step = TrainStep(config(target={"mode": "online"}, objectives={"pred": {}}), dtype=torch.bfloat16)
    step(batch(), 0)
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in step.encoder.blocks[0].mlp.parameters())


def test_activation_checkpointing_changes_nothing_but_memory():
    a, b = TrainStep(config()), TrainStep(config(model={"use_activation_checkpointing": True}))
    for i in range(2):
        assert torch.equal(a(batch(i), i).loss, b(batch(i), i).loss)
    assert all(torch.equal(x, y) for x, y in zip(weights(a).values(), weights(b).values()))


def test_state_round_trip_and_refusals():
    cfg = config()
    a, b = TrainStep(cfg), TrainStep(cfg)
    a(batch(0), 0)
    b(batch(7), 7)
    b.load_state_dict(copy.deepcopy(a.state_dict()))
    assert torch.equal(a(batch(1), 1).loss, b(batch(1), 1).loss)
    assert all(torch.equal(x, y) for x, y in zip(weights(a).values(), weights(b).values()))
    assert all(
        k.startswith("module.backbone.") for n in ("encoder", "predictor", "target_encoder") for k in a.state_dict()[n]
    )
    wider = TrainStep(config(model={"embed_dim": 96}))
    with pytest.raises(CheckpointError, match=r"^run/x.pt: encoder.*architecture") as caught:
        wider.load_state_dict(a.state_dict(), "run/x.pt")
    assert "\n" not in str(caught.value)
    other = TrainStep(config(objectives={"pred": {}}))
    with pytest.raises(CheckpointError, match="objectives.*ld"):
        other.load_state_dict(a.state_dict(), "run/x.pt")


def test_initial_weights_depend_on_the_seed_alone():
    torch.manual_seed(5)
    a = weights(TrainStep(config(objectives={"pred": {}})))
    torch.manual_seed(6)
    b = weights(TrainStep(config()))
    assert all(torch.equal(v, b[k]) for k, v in a.items())
    c = weights(TrainStep(dataclasses.replace(config(), seed=1)))
    assert not torch.equal(a["encoder.blocks.0.attn.qkv.weight"], c["encoder.blocks.0.attn.qkv.weight"])


def test_monitors_see_a_collapse():
    step = TrainStep(config())
    alive = step(batch(), 0, monitor=True).monitors
    assert {"rankme", "feature_std", "target_var"} <= set(alive) and float(alive["rankme"]) > 2
    with torch.no_grad():
        for module in (step.encoder, step.target_encoder):
            for norm in module.norms_block:
                norm.weight.zero_()
    dead = step(batch(), 1, monitor=True).monitors
    assert float(dead["rankme"]) < 1.1 and float(dead["feature_std"]) < 1e-3 and float(dead["target_var"]) < 1e-5
    assert step(batch(), 2).monitors == {}


def test_context_terms_need_the_predictors_context():
    with pytest.raises(ConfigError, match="objectives.context: .*model.predict_all=true"):
        TrainStep(config(model={"predict_all": False}))
    step = TrainStep(config(model={"predict_all": False}, objectives={"pred": {}}))
    assert torch.isfinite(step(batch(), 0).loss)


def test_context_warmup_of_the_loss_section_reaches_the_term():
    step = TrainStep(config(loss={"context_warmup": (0, 10)}))
    assert step(batch(), 0).weights["context"] == 0
    assert abs(float(step(batch(), 5).weights["context"]) - 0.25) < 1e-9


def test_devices():
    assert resolve_device("cpu").type == "cpu"
    if not torch.cuda.is_available():
        with pytest.raises(ConfigError, match="runtime.device"):
            resolve_device("cuda")
        with pytest.raises(ConfigError, match="runtime.device"):
            resolve_device("cuda:3")
    with pytest.raises(ConfigError, match="runtime.device"):
        resolve_device("toaster")
