"""pixels by hand: a head that says what it is told, against clips whose tubelets are known."""

import pytest
import torch

from tests.objectives.tiny import tensor, tiny_state
from vjepa_fast.imagenet import IMAGENET_MEAN, IMAGENET_STD
from vjepa_fast.objectives import LatentState, build_objectives

GRID = (2, 1, 2)  # patch 2, tubelet 2: clip [3, 4, 2, 4], 24 pixels a token
P = 24


def clip(frames=4, seed=0):
    return torch.randn(3, frames, 2, 4, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def tubelet(x, token, frames=2):
    """Pixels of a token by plain slicing, in the order channel, frame, row, column."""
    t, w = divmod(token, 2)
    return x[:, frames * t : frames * (t + 1), :, 2 * w : 2 * w + 2].flatten()


def value(state, *, bias=0.0, weight=0.0, dim=2, **fields):
    plan = build_objectives({"pixels": fields}, levels=1, embed_dim=dim, tubelet_size=2, patch_size=2).double()
    head = plan.heads["pixels"]
    assert head.weight.shape == (P, dim)
    with torch.no_grad():
        head.weight.copy_(torch.as_tensor(weight).expand_as(head.weight))
        head.bias.copy_(torch.as_tensor(bias).expand_as(head.bias))
    return plan(state).total


def state(pred, x=None, z_pred=None):
    z_pred = [[0.0, 0.0]] * len(pred) if z_pred is None else z_pred
    return tiny_state(GRID, z_pred=z_pred, pred=pred, clip=clip() if x is None else x)


def test_raw_pixels_by_hand():
    want = [tubelet(clip(), n) for n in (1, 2)]
    got = value(state([1, 2]), bias=0.5, norm=False)
    torch.testing.assert_close(got, torch.stack([(0.5 - y).square().mean() for y in want]).mean())


def test_the_head_says_the_pixels_of_each_token():
    y = torch.stack([tubelet(clip(), n) for n in (3, 0)])
    got = value(state([3, 0], z_pred=[[1.0, 0], [0, 1]]), weight=y.T, norm=False)
    assert got.item() == pytest.approx(0, abs=1e-25)


def test_norm_gives_each_token_mean_0_and_variance_1():
    """The published recipe: (y - mean) / sqrt(var + eps) with the unbiased variance over all of a token's pixels."""
    y = tubelet(clip(), 2)
    want = (y - y.mean()) / (y.var() + 0.01).sqrt()
    got = value(state([2]), bias=1.0, eps=0.01)
    torch.testing.assert_close(got, (1.0 - want).square().mean())
    brighter = clip() * 3 + 5  # neither brightness nor contrast counts, but for eps
    torch.testing.assert_close(value(state([2], brighter), bias=1.0), value(state([2]), bias=1.0), rtol=1e-5, atol=0)


def test_uint8_clips_are_normalised_as_the_encoder_reads_them():
    x = torch.randint(0, 256, (3, 4, 2, 4), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    s = state([1])
    s.clips = [x[None]]
    mean, std = (torch.tensor(v).view(3, 1, 1, 1) for v in (IMAGENET_MEAN, IMAGENET_STD))
    want = tubelet((x / 255 - mean) / std, 1).square().mean()
    assert value(s, norm=False).item() == pytest.approx(want.item(), rel=1e-5)


def test_a_still_image_is_a_tubelet_of_one_picture():
    """Tokens of a single frame have half the pixels of the head; both frames of its output are held to that picture."""
    x = clip(frames=1)
    picture = LatentState(
        grids=[(1, 1, 2)], clips=[x[None]], z_pred=[[tensor([[0.0, 0.0]])]], masks_pred=[[torch.tensor([[1]])]]
    )
    y = x[:, :, :, 2:].repeat(1, 2, 1, 1).flatten()
    bias = torch.arange(P, dtype=torch.float64)
    torch.testing.assert_close(value(picture, bias=bias, norm=False), (bias - y).square().mean())


def test_it_needs_no_target():
    """So that a run with this term alone never runs the target encoder."""
    plan = build_objectives({"pixels": {}}, levels=1, embed_dim=2)
    assert "h" not in plan.needs and plan.heads["pixels"].weight.shape == (3 * 2 * 16 * 16, 2)
