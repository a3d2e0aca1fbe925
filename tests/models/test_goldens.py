"""Encoder and predictor against values and gradients of the published code."""

from __future__ import annotations

import pytest
import torch

CASES = {
    "clip_full": ("clip", None),
    "clip_mask0": ("clip", "mask0"),
    "clip_mask1": ("clip", "mask1"),
    "img_full": ("img", None),
    "img_mask": ("img", "mask_img"),
    "clip_nonsquare": ("clip_nonsquare", None),
    "clip_4frames": ("clip_4frames", None),
}
PREDICTOR_CASES = {
    "video0": ("z0", "0", 0, "video"),
    "video1": ("z1", "1", 0, "video"),
    "video0_idx1": ("z0", "0", 1, "video"),
    "video0_idx2_mod": ("z0", "0", 2, "video"),
    "img": ("zi", "_img", 0, "image"),
}


def close(got, want, relative=1e-5):
    """Largest error below ``relative`` of the largest entry."""
    want = torch.as_tensor(want, device=got.device)
    assert got.shape == want.shape
    if got.is_cuda and got.dtype == torch.float32:
        relative *= 10  # attention kernels there multiply in another order and precision
    error = (got.detach() - want).abs().max().item()
    assert error <= relative * want.abs().max().item(), error


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("mode", ["train", "eval"])
def test_encoder_values(golden_encoder, encoder_golden, case, mode):
    clip, mask = CASES[case]
    masks = None if mask is None else encoder_golden(f"in/{mask}")
    with torch.no_grad():
        got = golden_encoder(encoder_golden(f"in/{clip}"), masks, hierarchical=mode == "train")
    close(got, encoder_golden(f"out/{mode}/{case}"))


def test_encoder_values_in_double(golden_encoder, encoder_golden):
    encoder, clip = golden_encoder.double(), encoder_golden("in/clip").double()
    with torch.no_grad():
        close(encoder(clip, encoder_golden("in/mask0")), encoder_golden("out_f64/train/clip_mask0"), 1e-10)
        close(encoder(clip, hierarchical=False), encoder_golden("out_f64/eval/clip_full"), 1e-10)


def test_two_masks_of_one_length_as_a_list(golden_encoder, encoder_golden):
    masks = [encoder_golden("in/mask0")[:, :12], encoder_golden("in/mask1")]
    with torch.no_grad():
        got = golden_encoder(encoder_golden("in/clip"), masks, hierarchical=False)
    close(torch.cat(got), encoder_golden("out/eval/clip_two_masks_concat"))


def check_parameter_gradients(module, golden, skip=()):
    names, norms = golden.arrays["grad/param_names"], golden.arrays["grad/param_grad_norm"]
    parameters = dict(module.named_parameters())
    assert set(names) == set(parameters)
    scale = norms.max()
    for name, norm in zip(names, norms):
        grad = parameters[name].grad
        if norm < 0:
            assert grad is None or not grad.any(), name
        else:
            slack = 10 if grad.is_cuda else 1
            assert abs(grad.norm().item() - norm) <= slack * (1e-5 * norm + 1e-7 * scale), name
    for name, want in golden.group("grad_full/").items():
        close(parameters[name].grad, want)


@pytest.mark.parametrize("recompute", [False, True])
def test_encoder_gradients(golden_encoder, encoder_golden, recompute):
    golden_encoder.use_activation_checkpointing = recompute
    clip = encoder_golden("in/clip").requires_grad_()
    out = golden_encoder(clip, encoder_golden("in/mask0"))
    (out * encoder_golden("grad/cot")).sum().backward()
    close(clip.grad.flatten(1).norm(dim=1), encoder_golden("grad/clip_norm_per_sample"))
    close(clip.grad.flatten()[:64], encoder_golden("grad/clip_head64"))
    check_parameter_gradients(golden_encoder, encoder_golden)


@pytest.mark.parametrize("case", PREDICTOR_CASES)
def test_predictor_values(golden_predictor, predictor_golden, case):
    z, masks, mask_index, modality = PREDICTOR_CASES[case]
    enc, pred = predictor_golden(f"in/mask_enc{masks}"), predictor_golden(f"in/mask_pred{masks}")
    with torch.no_grad():
        got = golden_predictor(predictor_golden(f"in/{z}"), enc, pred, mask_index=mask_index, modality=modality)
    close(got[0], predictor_golden(f"out/{case}/pred"))
    close(got[1], predictor_golden(f"out/{case}/context"))


def test_predictor_values_in_double(golden_predictor, predictor_golden):
    g = predictor_golden
    got = golden_predictor.double()(g("in/z0").double(), g("in/mask_enc0"), g("in/mask_pred0"))
    close(got[0], g("out_f64/video0/pred"), 1e-10)
    close(got[1], g("out_f64/video0/context"), 1e-10)


@pytest.mark.parametrize("recompute", [False, True])
def test_predictor_gradients(golden_predictor, predictor_golden, recompute):
    g = predictor_golden
    golden_predictor.use_activation_checkpointing = recompute
    z = g("in/z0").requires_grad_()
    pred, context = golden_predictor(z, g("in/mask_enc0"), g("in/mask_pred0"))
    ((pred * g("grad/cot_pred")).sum() + (context * g("grad/cot_context")).sum()).backward()
    close(z.grad, g("grad/z0"))
    check_parameter_gradients(golden_predictor, g)
