"""The reference's encoder and predictor against outputs and gradients of the published code."""

from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch

from vjepa_fast.reference import Encoder, Predictor

GOLDENS = Path(__file__).parents[1] / "goldens"


@cache
def load(name):
    with np.load(GOLDENS / f"{name}.npz") as file:
        return {key: file[key] for key in file.files}


def tensor(z, name, dtype=torch.float32):
    x = torch.from_numpy(z[name])
    return x.to(dtype) if x.is_floating_point() else x.long()


def state_dict(z):
    return {name[3:]: torch.from_numpy(value) for name, value in z.items() if name.startswith("sd/")}


def encoder(dtype=torch.float32, **kwargs):
    model = Encoder(crop_size=64, embed_dim=64, depth=12, num_heads=2, **kwargs)
    model.load_state_dict(state_dict(load("encoder")), strict=True)
    return model.to(dtype)


def predictor(dtype=torch.float32, **kwargs):
    model = Predictor(crop_size=64, num_frames=8, embed_dim=64, predictor_embed_dim=32, depth=8, num_heads=2, **kwargs)
    model.load_state_dict(state_dict(load("predictor")), strict=True)
    return model.to(dtype)


ENCODER_CASES = {
    "clip_full": ("clip", None),
    "clip_mask0": ("clip", "mask0"),
    "clip_mask1": ("clip", "mask1"),
    "img_full": ("img", None),
    "img_mask": ("img", "mask_img"),
    "clip_nonsquare": ("clip_nonsquare", None),
    "clip_4frames": ("clip_4frames", None),
}


@pytest.mark.parametrize("case", ENCODER_CASES)
def test_encoder_outputs(case):
    z = load("encoder")
    clip, mask = ENCODER_CASES[case]
    mask = None if mask is None else tensor(z, f"in/{mask}")
    model = encoder()
    with torch.no_grad():
        levels = model(tensor(z, f"in/{clip}"), mask)
        last = model(tensor(z, f"in/{clip}"), mask, hierarchical=False)
    np.testing.assert_allclose(levels, z[f"out/train/{case}"], atol=2e-5, rtol=1e-5)
    np.testing.assert_allclose(last, z[f"out/eval/{case}"], atol=2e-5, rtol=1e-5)
    assert torch.equal(last, levels[..., -64:])


def test_encoder_stacks_a_list_of_masks():
    z = load("encoder")
    masks = [tensor(z, "in/mask0")[:, :12], tensor(z, "in/mask1")]
    with torch.no_grad():
        got = encoder()(tensor(z, "in/clip"), masks, hierarchical=False)
    np.testing.assert_allclose(got, z["out/eval/clip_two_masks_concat"], atol=2e-5, rtol=1e-5)


def test_encoder_in_double_precision():
    z = load("encoder")
    model = encoder(torch.float64)
    with torch.no_grad():
        levels = model(tensor(z, "in/clip", torch.float64), tensor(z, "in/mask0"))
        last = model(tensor(z, "in/clip", torch.float64), hierarchical=False)
    # Positions are float32 before they meet the float64 frequencies, here as there.
    np.testing.assert_allclose(levels, z["out_f64/train/clip_mask0"], rtol=1e-8, atol=1e-8)
    np.testing.assert_allclose(last, z["out_f64/eval/clip_full"], rtol=1e-8, atol=1e-8)


def check_gradients(model, z):
    norms = dict(zip(z["grad/param_names"].tolist(), z["grad/param_grad_norm"]))
    parameters = dict(model.named_parameters())
    assert set(norms) == set(parameters)
    for name, parameter in parameters.items():
        if norms[name] == -1:
            assert parameter.grad is None, name
        else:
            assert parameter.grad.norm().item() == pytest.approx(norms[name], rel=1e-4, abs=1e-7), name
    for key in z:
        if key.startswith("grad_full/"):
            want = z[key]
            error = np.abs(parameters[key[10:]].grad.numpy() - want).max()
            assert error <= 1e-4 * np.abs(want).max(), key


@pytest.mark.parametrize("checkpointing", [False, True])
def test_encoder_gradients(checkpointing):
    z = load("encoder")
    model = encoder(use_activation_checkpointing=checkpointing)
    clip = tensor(z, "in/clip").requires_grad_(True)
    (model(clip, tensor(z, "in/mask0")) * tensor(z, "grad/cot")).sum().backward()
    np.testing.assert_allclose(clip.grad.flatten(1).norm(dim=1), z["grad/clip_norm_per_sample"], rtol=1e-4)
    np.testing.assert_allclose(clip.grad.flatten()[:64], z["grad/clip_head64"], rtol=1e-3, atol=1e-5)
    check_gradients(model, z)


PREDICTOR_CASES = {
    "video0": ("z0", "0", "video", 0),
    "video1": ("z1", "1", "video", 0),
    "video0_idx1": ("z0", "0", "video", 1),
    "video0_idx2_mod": ("z0", "0", "video", 2),
    "img": ("zi", "_img", "image", 0),
}


@pytest.mark.parametrize("case", PREDICTOR_CASES)
def test_predictor_outputs(case):
    z = load("predictor")
    name, mask, modality, index = PREDICTOR_CASES[case]
    with torch.no_grad():
        outputs = predictor()(
            tensor(z, f"in/{name}"), tensor(z, f"in/mask_enc{mask}"), tensor(z, f"in/mask_pred{mask}"), modality, index
        )
    for kind, out in zip(("pred", "context"), outputs):
        np.testing.assert_allclose(out, z[f"out/{case}/{kind}"], atol=2e-5, rtol=1e-5)


def test_predictor_in_double_precision():
    z = load("predictor")
    with torch.no_grad():
        outputs = predictor(torch.float64)(
            tensor(z, "in/z0", torch.float64), tensor(z, "in/mask_enc0"), tensor(z, "in/mask_pred0")
        )
    for kind, out in zip(("pred", "context"), outputs):
        np.testing.assert_allclose(out, z[f"out_f64/video0/{kind}"], rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_predictor_gradients(checkpointing):
    z = load("predictor")
    model = predictor(use_activation_checkpointing=checkpointing)
    z0 = tensor(z, "in/z0").requires_grad_(True)
    pred, context = model(z0, tensor(z, "in/mask_enc0"), tensor(z, "in/mask_pred0"))
    ((pred * tensor(z, "grad/cot_pred")).sum() + (context * tensor(z, "grad/cot_context")).sum()).backward()
    np.testing.assert_allclose(z0.grad, z["grad/z0"], rtol=1e-4, atol=1e-4 * np.abs(z["grad/z0"]).max())
    check_gradients(model, z)
