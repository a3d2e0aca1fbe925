"""The trainer's step against the reference's: same weights, clips and masks must give the same losses and gradients.

Published recipes that between them use every term, kind of mask and kind of target, shrunk to 48 channels and 32 px,
under ``compat: published``; the headline variant under ``intended`` too.
"""

from dataclasses import replace

import pytest
import torch

from vjepa_fast import config
from vjepa_fast.data import Batch, ClipGroup
from vjepa_fast.layers import cpu_block
from vjepa_fast.ops import _cpp
from vjepa_fast.reference import build_reference
from vjepa_fast.trainer.step import TrainStep

RECIPES = [
    *(
        f"mixed_4gpu_{name}"
        for name in ("baseline", "combo", "fwm_ld", "hw_ld", "fwm_hw_ld", "spectral", "ltc", "ac_hw", "fac")
    ),
    *(
        f"ucf101_4gpu_{name}"
        for name in (
            "motion_future",
            "hamiltonian",
            "kinematic_accel",
            "kinematic_anneal",
            "kinematic_huber",
            "kinematic_split",
            "sigreg",
            "sigreg_no_ema",
            "velgate",
        )
    ),
]
SIZE = [
    "data.crop_size=32",
    "data.patch_size=8",
    "data.dataset_fpcs=[8]",
    "data.datasets=[x.csv]",
    "data.datasets_weights=null",
    "model.embed_dim=48",
    "model.depth=4",
    "model.num_heads=2",
    "model.pred_embed_dim=24",
    "model.pred_depth=2",
    "model.pred_num_heads=2",
    "model.use_activation_checkpointing=false",
    "runtime.dtype=float32",
    "optimization.epochs=3",
    "optimization.ipe=4",
    "optimization.warmup=0.5",
]


def batch(step, size=4, frames=8):  # as many clips as temporal tokens: published motion maps need it
    clip = torch.randint(
        0, 256, (size, 3, frames, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(step)
    )
    nothing = torch.zeros(size, dtype=torch.int64)
    modality = "image" if frames == 1 else "video"
    group = ClipGroup(
        clip=clip, labels=nothing, dataset=nothing, paths=["x"] * size, fpc=frames, modality=modality, first_sample=0
    )
    return Batch(groups=[group], step=step)


def pair(recipe, *overrides, compat="published"):
    """Both steps with the same weights."""
    cfg = config.load(recipe, [*SIZE, f"compat={compat}", *overrides])
    fast = TrainStep(cfg)
    o, m = cfg.optimization, cfg.model
    objectives = {term: dict(fields or {}) for term, fields in cfg.objectives.items()}
    if cfg.loss.context_warmup is not None:
        objectives["context"]["warmup"] = cfg.loss.context_warmup
    slow = build_reference(
        crop_size=32,
        patch_size=8,
        num_frames=8,
        embed_dim=48,
        depth=4,
        num_heads=2,
        pred_embed_dim=24,
        pred_depth=2,
        pred_num_heads=2,
        num_mask_tokens=len(fast.predictor.mask_tokens),
        objectives=objectives,
        interpolate_rope=m.interpolate_rope,
        rope_variant=m.rope_variant,
        modality_embedding=m.modality_embedding,
        img_temporal_dim_size=m.img_temporal_dim_size,
        seed=cfg.seed,
        ld_grad=compat == "intended",
        sigreg_seed=cfg.seed if compat == "intended" else 0,
        epochs=o.epochs,
        ipe=o.ipe,
        ipe_scale=o.ipe_scale,
        lr=o.lr,
        start_lr=o.start_lr,
        final_lr=o.final_lr,
        warmup=o.warmup,
        weight_decay=o.weight_decay,
        final_weight_decay=o.final_weight_decay,
        ema=cfg.target.ema,
        betas=o.betas,
        eps=o.eps,
        disable_ema=cfg.target.mode == "online",
        mask_index=0 if fast.shared_token else None,
    )
    slow.encoder.load_state_dict(fast.encoder.state_dict(), strict=True)
    slow.predictor.load_state_dict(fast.predictor.state_dict(), strict=True)
    slow.target_encoder.load_state_dict(fast.target_encoder.state_dict(), strict=True)
    slow.losses.heads.load_state_dict(fast.plan.heads.state_dict(), strict=True)
    return fast, slow


def masks_of(fast, data, index):
    enc, pred = fast.sampler(data.groups[0].clip, step=index, first_sample=0, group=0)
    return [data.groups[0].clip], [enc], [pred]


def check_gradients(fast, slow, rtol=1e-5):
    for ours, reference in (
        (fast.encoder, slow.encoder),
        (fast.predictor, slow.predictor),
        (fast.plan.heads, slow.losses.heads),
    ):
        wanted = dict(reference.named_parameters())
        for name, p in ours.named_parameters():
            want = wanted[name].grad
            if want is None or not want.any():
                assert p.grad is None or not p.grad.any(), name
            else:
                assert (p.grad - want).norm() <= rtol * want.norm(), name


def in_double_precision(fast, slow, data):
    """Gradients are compared in float64: in float32 rounding flips signs at the kinks of the absolute errors."""
    for module in (
        fast.encoder,
        fast.predictor,
        fast.target_encoder,
        fast.plan,
        slow.encoder,
        slow.predictor,
        slow.target_encoder,
        slow.losses,
    ):
        module.double()
    group = data.groups[0]
    return Batch(groups=[replace(group, clip=slow.normalize(group.clip).double())], step=data.step)


@pytest.mark.parametrize("recipe", RECIPES)
def test_losses_and_gradients(recipe):
    fast, slow = pair(recipe)
    data = in_double_precision(fast, slow, batch(0))
    slow.step = 5  # past the warm-ups
    total, values, weights = slow.forward(*masks_of(fast, data, 5))
    total.backward()
    out = fast(data, 5)
    assert out.loss.item() == pytest.approx(total.item(), rel=1e-7)
    assert set(out.terms) == set(values)
    for term, value in values.items():
        assert out.terms[term].item() == pytest.approx(value.item(), rel=1e-7, abs=1e-12), term
        assert float(out.weights[term]) == pytest.approx(weights[term], rel=1e-6), term
    check_gradients(fast, slow)


@pytest.mark.parametrize("name", ["baseline", "fwm_hw_ld", "fwm_ld", "ltc", "ac_hw", "fac"])
def test_float32_as_it_trains(name, monkeypatch):
    """The step as it runs on a CPU, with the fused block. (Terms that compare small differences of features, delta and
    spectral, have kinks near which rounding decides a sign: float64 above.)
    """
    served = []
    honest = cpu_block.supports
    monkeypatch.setattr(cpu_block, "supports", lambda *args: served.append(honest(*args)) or served[-1])
    fast, slow = pair(f"mixed_4gpu_{name}")
    data = batch(0)
    slow.step = 5
    total, values, _ = slow.forward(*masks_of(fast, data, 5))
    total.backward()
    out = fast(data, 5)
    assert out.loss.item() == pytest.approx(total.item(), rel=1e-5)
    for term, value in values.items():
        assert out.terms[term].item() == pytest.approx(value.item(), rel=1e-5, abs=1e-7), term
    check_gradients(fast, slow, 1e-4)
    assert served == [_cpp.LOADED] * (2 * 4 + 2)  # target, context and predictor blocks


@pytest.mark.parametrize("compat", ["published", "intended"])
def test_several_steps_of_the_headline_variant(compat):
    fast, slow = pair("mixed_4gpu_fwm_hw_ld", "loss.context_warmup=[0,4]", compat=compat)
    for index in range(6):
        data = batch(index)
        want = slow(*masks_of(fast, data, index))
        out = fast(data, index)
        assert out.loss.item() == pytest.approx(want["loss"], rel=1e-5)
        assert (out.lr, out.momentum) == pytest.approx((want["lr"], want["ema"]), rel=1e-12)
    for ours, reference in ((fast.encoder, slow.encoder), (fast.target_encoder, slow.target_encoder)):
        for a, b in zip(ours.parameters(), reference.parameters()):
            torch.testing.assert_close(a, b, rtol=1e-3, atol=2e-4)


def test_images():
    fast, slow = pair("mixed_4gpu_fwm_hw_ld")
    data = in_double_precision(fast, slow, batch(0, frames=1))
    total, values, _ = slow.forward(*masks_of_images(fast, data))
    total.backward()
    out = fast(data, 0)
    assert out.loss.item() == pytest.approx(total.item(), rel=1e-5)
    assert values["ld"] == out.terms["ld"] == 0  # nothing moves
    check_gradients(fast, slow)


def masks_of_images(fast, data):
    from vjepa_fast.trainer.step import IMAGE_GROUPS

    enc, pred = fast.img_sampler(data.groups[0].clip, step=0, first_sample=0, group=IMAGE_GROUPS)
    return [data.groups[0].clip], [enc], [pred]
