"""The whole reference step: what it updates, and with which coefficients."""

import pytest
import torch

from vjepa_fast.reference import MaskCollator, build_reference

GRID = (4, 4, 4)
SIZE = dict(
    crop_size=64,
    num_frames=8,
    embed_dim=24,
    depth=4,
    num_heads=2,
    levels=4,
    pred_embed_dim=24,
    pred_depth=4,
    pred_num_heads=2,
    epochs=2,
    ipe=5,
)
EVERYTHING = {
    "pred": {},
    "context": {"coeff": 0.5, "warmup": (0, 4)},
    "hw": {"coeff": 0.3},
    "fwm_static": {"coeff": 0.05},
    "fwm_orth": {"coeff": 0.01},
    "ld": {"hidden_dim": 8},
    "delta": {"coeff": 0.5},
    "ltc": {"coeff": 0.5},
    "spectral": {},
    "ac": {"hidden_dim": 8},
    "kinematic": {},
    "velgate": {},
    "hamiltonian": {"hidden_dim": 8},
    "sigreg": {"coeff": 0.01, "num_slices": 16},
}


def batch(size=2, seed=0):
    generator = torch.Generator().manual_seed(seed)
    clip = torch.randint(0, 256, (size, 3, 8, 64, 64), dtype=torch.uint8, generator=generator)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        enc, pred = MaskCollator([{"num_blocks": 2}, {"num_blocks": 1, "spatial_scale": (0.5, 0.5)}], GRID)(clip)
    return [clip], [enc], [pred]


def parameters(module):
    return {name: p.detach().clone() for name, p in module.named_parameters()}


def moved(before, module):
    return {name for name, p in module.named_parameters() if not torch.equal(before[name], p)}


def test_all_terms_in_one_step_train_everything():
    step = build_reference(objectives=EVERYTHING, num_mask_tokens=2, mask_index=None, **SIZE)
    step(*batch())  # mask tokens and modality embeddings start at zero or near it: give every path a gradient
    before = [parameters(module) for module in (step.encoder, step.predictor, step.losses, step.target_encoder)]
    out = step(*batch(seed=1))
    assert out["loss"] == pytest.approx(sum(out["weights"][t] * out["terms"][t] for t in EVERYTHING), rel=1e-6)
    assert set(out["terms"]) == set(EVERYTHING) and all(value > 0 for value in out["terms"].values())
    # The image path sees no image; the energy's last bias has no gradient.
    idle_encoder = {"patch_embed_img.proj.weight", "patch_embed_img.proj.bias", "img_mod_embed"}
    assert set(before[0]) - moved(before[0], step.encoder) == idle_encoder
    assert set(before[1]) - moved(before[1], step.predictor) == {"img_mod_embed"}
    assert set(before[2]) - moved(before[2], step.losses) == {"heads.hamiltonian.net.4.bias"}
    assert moved(before[3], step.target_encoder) >= set(before[0]) - idle_encoder


def test_target_is_the_moving_average_and_schedules_advance():
    step = build_reference(**SIZE, ema=(0.5, 1.0), lr=1e-3, start_lr=1e-4, final_lr=1e-3, warmup=1.0, weight_decay=0.1)
    for i in range(3):
        target = parameters(step.target_encoder)
        out = step(*batch(seed=i))
        momentum = 0.5 + i * 0.5 / 10
        assert out["ema"] == pytest.approx(momentum)
        assert out["lr"] == pytest.approx(1e-4 + (i + 1) / 5 * 9e-4)
        for name, p in step.encoder.named_parameters():
            want = momentum * target[name] + (1 - momentum) * p
            torch.testing.assert_close(dict(step.target_encoder.named_parameters())[name], want)
    assert step.step == 3


def test_weight_decay_spares_biases_and_one_dimensional_parameters():
    step = build_reference(objectives={"pred": {}, "ld": {"hidden_dim": 8}}, **SIZE)
    plain = {id(p) for group in step.optimizer.param_groups if group.get("WD_exclude") for p in group["params"]}
    named = [pair for module in (step.encoder, step.predictor, step.losses) for pair in module.named_parameters()]
    assert {id(p) for name, p in named if "bias" in name or p.dim() == 1} == plain
    assert sum(len(group["params"]) for group in step.optimizer.param_groups) == len(named)


@pytest.mark.parametrize("ld_grad", [False, True])
def test_headline_variant_trains_ld_only_when_repaired(ld_grad):
    """As published, an update of fwm_hw_ld is that of fwm + hw, to the last bit."""
    without = {"pred": {}, "hw": {}, "fwm_static": {"coeff": 0.05}, "fwm_orth": {"coeff": 0.01}}
    headline = without | {"ld": {"channels": "dynamics", "hidden_dim": 8, "hard_weighting": 1.0}}
    runs = [build_reference(objectives=o, ld_grad=ld_grad, **SIZE) for o in (without, headline)]
    head = parameters(runs[1].losses)
    for run in runs:
        run(*batch())
    same = all(torch.equal(a, b) for a, b in zip(runs[0].encoder.parameters(), runs[1].encoder.parameters()))
    assert same is not ld_grad
    assert bool(moved(head, runs[1].losses)) is ld_grad


def test_without_ema_the_saved_target_stays_at_its_initialisation():
    step = build_reference(objectives={"pred": {}, "kinematic": {}}, disable_ema=True, **SIZE)
    start = parameters(step.target_encoder)
    step(*batch())
    assert not moved(start, step.target_encoder)
    assert moved(start, step.encoder)


def test_kinematic_has_no_gradient_with_an_ema_target():
    runs = [build_reference(objectives=o, **SIZE) for o in ({"pred": {}}, {"pred": {}, "kinematic": {}})]
    for run in runs:
        run(*batch())
    assert all(torch.equal(a, b) for a, b in zip(runs[0].encoder.parameters(), runs[1].encoder.parameters()))


def test_context_weight_follows_the_published_steps_by_default():
    step = build_reference(**SIZE)
    assert step(*batch())["weights"] == {"pred": 1.0, "context": 0.0}
    step.step = 22500
    assert step(*batch())["weights"]["context"] == 0.25


def test_single_frames_go_through_the_image_path():
    step = build_reference(**SIZE)
    before = parameters(step.encoder)
    clip = torch.rand(2, 3, 1, 64, 64)
    enc, pred = torch.arange(0, 6).repeat(2, 1), torch.arange(6, 16).repeat(2, 1)
    step([clip], [[enc, enc]], [[pred, pred]])
    changed = moved(before, step.encoder)
    assert "img_mod_embed" in changed and "patch_embed_img.proj.weight" in changed
    assert "video_mod_embed" not in changed and "patch_embed.proj.weight" not in changed


def test_bfloat16_and_activation_checkpointing():
    plain = build_reference(**SIZE)
    recomputed = build_reference(**SIZE, use_activation_checkpointing=True)
    half = build_reference(**SIZE, dtype=torch.bfloat16)
    losses = [run(*batch())["loss"] for run in (plain, recomputed, half)]
    assert losses[0] == losses[1]
    assert losses[0] != losses[2] and losses[2] == pytest.approx(losses[0], rel=2e-2)
    assert all(torch.equal(a, b) for a, b in zip(plain.encoder.parameters(), recomputed.encoder.parameters()))


def test_initialisation_is_seeded_and_leaves_the_global_generator_alone():
    state = torch.get_rng_state()
    first, second, other = (build_reference(seed=seed, **SIZE) for seed in (1, 1, 2))
    assert torch.equal(state, torch.get_rng_state())
    weights = [run.encoder.blocks[0].attn.qkv.weight for run in (first, second, other)]
    assert torch.equal(weights[0], weights[1]) and not torch.equal(weights[0], weights[2])
