"""tubelet_patchify, patch_mean and normalize_clip against Conv3d, plain loops and torchvision's formula."""

import pytest
import torch
import torch.nn.functional as F

from tests.ops.parity import BACKENDS, device_for
from vjepa_fast import ops
from vjepa_fast.ops.patchify import _patch_mean, _patchify

MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.25, 0.3)


@pytest.fixture(params=BACKENDS)
def device(request):
    """Where the clip must live for the backend that the test runs on."""
    with ops.use_backend(request.param):
        yield device_for(request.param)


def uint8_clip(*shape, seed=0):
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


def published_normalize(clip):
    mean, std = (torch.tensor(v, dtype=torch.float64).view(3, 1, 1, 1) for v in (MEAN, STD))
    return (clip.double() / 255 - mean) / std


def loop_patches(x, tubelet, patch):
    """[B,N,P] by plain slicing."""
    b, _, f, height, width = x.shape
    rows = [
        x[:, :, t : t + tubelet, i : i + patch, j : j + patch].reshape(b, -1)
        for t in range(0, f, tubelet)
        for i in range(0, height, patch)
        for j in range(0, width, patch)
    ]
    return torch.stack(rows, 1)


@pytest.mark.parametrize(
    ("shape", "tubelet", "patch"),
    [
        ((2, 3, 4, 8, 12), 2, 4),
        ((1, 3, 1, 6, 6), 1, 3),
        ((3, 3, 2, 4, 4), 2, 4),
    ],
)
def test_linear_on_patches_is_conv3d(shape, tubelet, patch):
    conv = torch.nn.Conv3d(3, 5, (tubelet, patch, patch), (tubelet, patch, patch)).double()
    clip = torch.randn(shape, dtype=torch.float64)
    out = F.linear(ops.tubelet_patchify(clip, None, tubelet, patch), conv.weight.flatten(1), conv.bias)
    torch.testing.assert_close(out, conv(clip).flatten(2).transpose(1, 2), rtol=1e-12, atol=1e-12)


def test_uint8_is_scaled_normalised_and_gathered(device):
    clip = uint8_clip(2, 3, 4, 8, 8)
    idx = torch.tensor([[7, 0, 3], [2, 2, 5]])
    expected = loop_patches(published_normalize(clip), 2, 4)
    expected = torch.stack([expected[b][idx[b]] for b in range(2)])
    clip, idx = clip.to(device), idx.to(device)
    out = ops.tubelet_patchify(clip, idx, 2, 4, MEAN, STD)
    assert out.dtype == torch.float32
    torch.testing.assert_close(out.double().cpu(), expected, rtol=1e-6, atol=1e-6)
    half = ops.tubelet_patchify(clip, idx, 2, 4, MEAN, STD, torch.bfloat16)
    assert torch.equal(half, out.bfloat16())
    with ops.use_backend("auto"):
        double = ops.tubelet_patchify(clip, idx, 2, 4, MEAN, STD, torch.float64)
    torch.testing.assert_close(double.cpu(), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_float_clips_pass_unchanged_whatever_the_statistics(dtype):
    clip = torch.randn(2, 3, 2, 4, 4).to(dtype)
    assert torch.equal(ops.tubelet_patchify(clip, None, 2, 2, MEAN, STD), loop_patches(clip, 2, 2))
    assert torch.equal(ops.normalize_clip(clip, MEAN, STD), clip.to(torch.promote_types(dtype, torch.float32)))


def test_normalize_clip_agrees_with_patchify_and_leaves_its_input(device):
    clip = uint8_clip(2, 3, 2, 16, 32).to(device)
    before = clip.clone()
    out = ops.normalize_clip(clip, MEAN, STD)
    assert out.dtype == torch.float32 and torch.equal(clip, before)
    torch.testing.assert_close(out.double().cpu(), published_normalize(clip.cpu()), rtol=1e-6, atol=1e-6)
    assert torch.equal(loop_patches(out, 2, 16), ops.tubelet_patchify(clip, None, 2, 16, MEAN, STD))


def test_patch_mean_is_the_mean_of_the_normalised_clip(device):
    clip = uint8_clip(2, 3, 4, 8, 12)
    expected = F.avg_pool3d(published_normalize(clip), (2, 4, 4)).permute(0, 2, 3, 4, 1)
    out = ops.patch_mean(clip.to(device), 2, 4, MEAN, STD)
    assert out.shape == (2, 2, 2, 3, 3) and out.dtype == torch.float32
    torch.testing.assert_close(out.double().cpu(), expected, rtol=1e-6, atol=1e-6)
    plain = torch.randn(1, 3, 2, 4, 4, dtype=torch.float64)
    pooled = F.avg_pool3d(plain, (2, 2, 2)).permute(0, 2, 3, 4, 1)
    assert ops.patch_mean(plain.bfloat16().to(device), 2, 2).dtype == torch.float32
    with ops.use_backend("eager"):
        torch.testing.assert_close(ops.patch_mean(plain, 2, 2, MEAN, STD), pooled, rtol=1e-12, atol=1e-12)


def test_gradients_reach_float_clips():
    clip = torch.randn(2, 3, 2, 4, 6, dtype=torch.float64, requires_grad=True)
    idx = torch.tensor([[0, 5], [3, 3]])  # a repeated token adds up
    assert torch.autograd.gradcheck(lambda c: ops.tubelet_patchify(c, idx, 2, 2), (clip,))
    assert torch.autograd.gradcheck(lambda c: ops.tubelet_patchify(c, None, 1, 2), (clip,))
    assert torch.autograd.gradcheck(lambda c: ops.patch_mean(c, 2, 2), (clip,))


def test_single_token_and_empty_selection(device):
    clip = torch.randn(1, 3, 2, 4, 4, device=device)
    out = ops.tubelet_patchify(clip, None, 2, 4)  # one token: the rows are the clip, and still no view of it
    assert torch.equal(out.flatten(), clip.flatten()) and out.data_ptr() != clip.data_ptr()
    assert ops.tubelet_patchify(clip, torch.empty(1, 0, dtype=torch.int64, device=device), 2, 2).shape == (1, 0, 24)


@pytest.mark.parametrize(
    "clip",
    [
        uint8_clip(2, 3, 4, 8, 8),
        torch.randn(2, 3, 4, 8, 8, requires_grad=True),
        torch.randn(2, 4, 8, 8, 3, dtype=torch.float16).permute(0, 4, 1, 2, 3),
    ],
)
def test_opcheck_and_compile(clip):
    idx = torch.tensor([[7, 0, 3], [2, 4, 5]])
    for i in (idx, None):
        torch.library.opcheck(_patchify, (clip, i, 2, 4, list(MEAN), list(STD), torch.bfloat16))
    torch.library.opcheck(_patch_mean, (clip, 2, 4, list(MEAN), list(STD)))

    def fn(c, i):
        return ops.tubelet_patchify(c, i, 2, 4, MEAN, STD).float().sum() + ops.patch_mean(c, 2, 4, MEAN, STD).sum()

    compiled = torch.compile(fn, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(clip, idx), fn(clip, idx))
    if clip.requires_grad:
        grads = [torch.autograd.grad(f(clip, idx), clip)[0] for f in (fn, compiled)]
        torch.testing.assert_close(*grads)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (dict(clip=torch.zeros(3, 4, 8, 8)), r"clip: expected a tensor \[B,C,F,H,W\], got float32 \[3, 4, 8, 8\]"),
        (
            dict(clip=torch.zeros(1, 3, 4, 8, 8, dtype=torch.int64)),
            "clip: expected uint8 or a floating dtype, got int64",
        ),
        (dict(clip=torch.zeros(1, 3, 3, 8, 8)), "clip: frames: 3 is not a multiple of tubelet 2"),
        (dict(clip=torch.zeros(1, 3, 4, 8, 10)), "clip: width: 10 is not a multiple of patch 4"),
        (dict(tubelet=0), "tubelet: expected a positive int, got 0"),
        (dict(mean=(0.5,)), r"mean: expected 3 values, one per channel, got \(0.5,\)"),
        (dict(std=(1.0, 0.0, 1.0)), "std: expected positive values"),
        (dict(idx=torch.tensor([0, 1])), r"idx: expected an int64 tensor \[B,K\], got int64 \[2\]"),
        (dict(idx=torch.tensor([[0], [1]])), "idx: expected a batch of 1"),
        (dict(idx=torch.tensor([[8]])), r"idx: expected token indices in \[0, 8\), got \[8, 8\]"),
        (dict(out_dtype=torch.int32), "out_dtype: expected a floating dtype"),
    ],
)
def test_argument_errors(change, text):
    args = dict(clip=uint8_clip(1, 3, 4, 8, 8), idx=None, tubelet=2, patch=4, mean=MEAN, std=STD)
    with pytest.raises(ValueError, match="tubelet_patchify: " + text):
        ops.tubelet_patchify(**{**args, **change})
