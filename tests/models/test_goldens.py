"""Encoder and predictor, ours and the reference's, against values and gradients of the published code."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from tests.ops.parity import DEVICES
from vjepa_fast import reference
from vjepa_fast.models import build_encoder, build_predictor

GOLDENS = Path(__file__).parents[1] / "goldens"
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


class Golden:
    """Arrays of an .npz as tensors on ``device`` (ids as int64), and the model whose weights they hold."""

    def __init__(self, name, kind, device):
        self.arrays, self.device = np.load(GOLDENS / name), device
        self.ours = kind == "ours"
        self.model = (self._encoder if name == "encoder.npz" else self._predictor)()
        self.model.load_state_dict(self.group("sd/"), strict=True)
        self.model.to(device)

    def _encoder(self):
        shape = dict(embed_dim=64, depth=12, num_heads=2)
        return (
            build_encoder(img_size=64, num_frames=8, **shape) if self.ours else reference.Encoder(crop_size=64, **shape)
        )

    def _predictor(self):
        shape = dict(depth=8, num_heads=2, num_mask_tokens=2)
        if not self.ours:
            return reference.Predictor(crop_size=64, num_frames=8, embed_dim=64, predictor_embed_dim=32, **shape)
        encoder = build_encoder(img_size=64, num_frames=8, embed_dim=64, depth=12, num_heads=2)
        return build_predictor(encoder, embed_dim=32, **shape)

    def __call__(self, key):
        tensor = torch.from_numpy(self.arrays[key]).to(self.device)
        return tensor.long() if tensor.dtype == torch.int32 else tensor

    def group(self, prefix):
        return {key[len(prefix) :]: self(key) for key in self.arrays.files if key.startswith(prefix)}

    def close(self, got, key, relative=1e-5):
        """Largest error below ``relative`` of the largest entry."""
        want = self(key)
        assert got.shape == want.shape
        if got.is_cuda and got.dtype == torch.float32:
            relative *= 10  # attention kernels there multiply in another order and precision
        error = (got.detach() - want).abs().max().item()
        assert error <= relative * want.abs().max().item(), error

    def check_parameter_gradients(self):
        names, norms = self.arrays["grad/param_names"], self.arrays["grad/param_grad_norm"]
        parameters = dict(self.model.named_parameters())
        assert set(names) == set(parameters)
        scale = norms.max()
        for name, norm in zip(names, norms):
            grad = parameters[name].grad
            if norm < 0:
                assert grad is None, name
            else:
                slack = 10 if grad.is_cuda else 1
                assert abs(grad.norm().item() - norm) <= slack * (1e-5 * norm + 1e-7 * scale), name
        for name in self.group("grad_full/"):
            self.close(parameters[name].grad, f"grad_full/{name}")


KINDS = [*(("ours", device) for device in DEVICES), ("reference", "cpu")]


@pytest.fixture(params=KINDS, ids="-".join)
def encoder(request):
    return Golden("encoder.npz", *request.param)


@pytest.fixture(params=KINDS, ids="-".join)
def predictor(request):
    return Golden("predictor.npz", *request.param)


@pytest.mark.parametrize("case", CASES)
def test_encoder_values(encoder, case):
    clip, mask = CASES[case]
    masks = None if mask is None else encoder(f"in/{mask}")
    with torch.no_grad():
        levels = encoder.model(encoder(f"in/{clip}"), masks)
        last = encoder.model(encoder(f"in/{clip}"), masks, hierarchical=False)
    encoder.close(levels, f"out/train/{case}")
    encoder.close(last, f"out/eval/{case}")
    assert torch.equal(last, levels[..., -64:])


def test_encoder_values_in_double(encoder):
    model, clip = encoder.model.double(), encoder("in/clip").double()
    relative = 1e-10 if encoder.ours else 1e-9  # there positions are float32 before they meet float64 frequencies
    with torch.no_grad():
        encoder.close(model(clip, encoder("in/mask0")), "out_f64/train/clip_mask0", relative)
        encoder.close(model(clip, hierarchical=False), "out_f64/eval/clip_full", relative)


def test_two_masks_of_one_length_as_a_list(encoder):
    masks = [encoder("in/mask0")[:, :12], encoder("in/mask1")]
    with torch.no_grad():
        got = encoder.model(encoder("in/clip"), masks, hierarchical=False)
    encoder.close(torch.cat(got) if encoder.ours else got, "out/eval/clip_two_masks_concat")


@pytest.mark.parametrize("recompute", [False, True])
def test_encoder_gradients(encoder, recompute):
    encoder.model.use_activation_checkpointing = recompute
    clip = encoder("in/clip").requires_grad_()
    out = encoder.model(clip, encoder("in/mask0"))
    (out * encoder("grad/cot")).sum().backward()
    encoder.close(clip.grad.flatten(1).norm(dim=1), "grad/clip_norm_per_sample")
    encoder.close(clip.grad.flatten()[:64], "grad/clip_head64")
    encoder.check_parameter_gradients()


@pytest.mark.parametrize("case", PREDICTOR_CASES)
def test_predictor_values(predictor, case):
    z, masks, index, modality = PREDICTOR_CASES[case]
    enc, pred = predictor(f"in/mask_enc{masks}"), predictor(f"in/mask_pred{masks}")
    with torch.no_grad():
        got = predictor.model(predictor(f"in/{z}"), enc, pred, mask_index=index, modality=modality)
    predictor.close(got[0], f"out/{case}/pred")
    predictor.close(got[1], f"out/{case}/context")


def test_predictor_values_in_double(predictor):
    relative = 1e-10 if predictor.ours else 1e-9
    with torch.no_grad():
        got = predictor.model.double()(
            predictor("in/z0").double(), predictor("in/mask_enc0"), predictor("in/mask_pred0")
        )
    predictor.close(got[0], "out_f64/video0/pred", relative)
    predictor.close(got[1], "out_f64/video0/context", relative)


@pytest.mark.parametrize("recompute", [False, True])
def test_predictor_gradients(predictor, recompute):
    predictor.model.use_activation_checkpointing = recompute
    z = predictor("in/z0").requires_grad_()
    pred, context = predictor.model(z, predictor("in/mask_enc0"), predictor("in/mask_pred0"))
    ((pred * predictor("grad/cot_pred")).sum() + (context * predictor("grad/cot_context")).sum()).backward()
    predictor.close(z.grad, "grad/z0")
    predictor.check_parameter_gradients()
