"""tubelet_patchify, patch_mean and normalize_clip: Conv3d, plain loops, and every backend against eager code."""

import pytest
import torch
import torch.nn.functional as F

from tests.draws import given, settings, st
from tests.ops.clip_cases import AVAILABLE, DTYPES, VIEWS, assert_clip_parity, make_clip
from tests.ops.clip_cases import MEAN as FOUR_MEANS
from tests.ops.clip_cases import STD as FOUR_STDS
from tests.ops.parity import BACKENDS, KERNELS, assert_parity, device_for, moved
from vjepa_fast import ops
from vjepa_fast.ops.patchify import _patch_mean, _patchify

MEAN, STD = FOUR_MEANS[:3], FOUR_STDS[:3]


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
    ("shape", "tubelet", "patch"), [((2, 3, 4, 8, 12), 2, 4), ((1, 3, 1, 6, 6), 1, 3), ((3, 3, 2, 4, 4), 2, 4)]
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


@pytest.mark.parametrize(
    "clip",
    [
        uint8_clip(2, 3, 4, 8, 8),
        torch.randn(2, 3, 4, 8, 8, requires_grad=True),
        torch.randn(2, 4, 8, 8, 3, dtype=torch.float16).permute(0, 4, 1, 2, 3),
    ],
)
def test_opcheck_and_compile_in_eager_code(clip):
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


@pytest.fixture(params=KERNELS)
def backend(request):
    return request.param


def tokens(b, n, k, seed=0):
    return torch.randint(0, n, (b, k), generator=torch.Generator().manual_seed(seed))


def assert_same_bits(backend, clip, idx, tubelet, patch, out_dtype=None):
    mean, std = FOUR_MEANS[: clip.shape[1]], FOUR_STDS[: clip.shape[1]]
    with ops.use_backend("eager"):
        want = ops.tubelet_patchify(clip, idx, tubelet, patch, mean, std, out_dtype)
    clip, idx = (x if x is None else moved(x, device_for(backend)) for x in (clip, idx))
    with ops.use_backend(backend):
        got = ops.tubelet_patchify(clip, idx, tubelet, patch, mean, std, out_dtype).cpu()
    assert got.dtype == want.dtype and got.is_contiguous()
    assert torch.equal(got, want)


def assert_mean_parity(backend, clip, tubelet, patch, **kwargs):
    assert_clip_parity(lambda c, *stats: ops.patch_mean(c, tubelet, patch, *stats), clip, backend=backend, **kwargs)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("out_dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("shape", "tubelet", "patch", "k"),
    [
        ((2, 3, 4, 32, 48), 2, 16, 7),
        ((2, 3, 2, 28, 42), 2, 14, 5),
        ((1, 1, 1, 6, 9), 1, 3, 4),
        ((2, 3, 8, 8, 8), 4, 8, 1),
        ((1, 4, 3, 64, 64), 3, 32, 3),
    ],
)
def test_patchify_bits(backend, dtype, out_dtype, shape, tubelet, patch, k):
    clip = make_clip(shape, dtype)
    n = shape[2] // tubelet * (shape[3] // patch) * (shape[4] // patch)
    for idx in (tokens(shape[0], n, k), tokens(1, shape[0] * n, 2 * k), None):  # the second: of all samples in one row
        assert_same_bits(backend, clip, idx, tubelet, patch, out_dtype)


@settings(max_examples=8, deadline=None, derandomize=True, database=None)
@given(data=st.data())
def test_shapes(data):
    draw = lambda *x: data.draw(st.integers(*x))  # noqa: E731
    b, c, tubelet, patch = draw(1, 2), draw(1, 4), draw(1, 4), draw(1, 17)
    t, h, w, k = draw(1, 2), draw(1, 2), draw(1, 3), draw(0, 5)
    clip = make_clip((b, c, t * tubelet, h * patch, w * patch), data.draw(st.sampled_from(DTYPES)), seed=patch)
    for backend in AVAILABLE:
        assert_same_bits(backend, clip, tokens(b, t * h * w, k, seed=k), tubelet, patch)
        assert_mean_parity(backend, clip, tubelet, patch)


@pytest.mark.parametrize("view", VIEWS)
@pytest.mark.parametrize("dtype", [torch.uint8, torch.bfloat16], ids=str)
def test_strided_clips(backend, dtype, view):
    clip = make_clip((2, 3, 4, 8, 12), dtype)
    strided = VIEWS[view](clip)
    assert not strided.is_contiguous()
    assert_same_bits(backend, strided, tokens(5, 12, 2).t(), 2, 4)  # strided indices
    assert_mean_parity(backend, clip, 2, 4, view=VIEWS[view])


def test_clip_is_not_copied(backend):
    clip = make_clip((1, 3, 1, 8, 8), torch.uint8).to(device_for(backend))
    endless = clip.expand(-1, -1, 10**8, -1, -1)  # 19 GB, were it copied
    idx = torch.tensor([[4 * (10**8 - 1) + 3, 0]], device=clip.device)
    with ops.use_backend(backend):
        few, whole = ops.tubelet_patchify(endless, idx, 1, 4), ops.tubelet_patchify(clip, None, 1, 4)
    assert torch.equal(few, whole[:, [3, 0]])


def test_offsets_beyond_32_bits(backend):
    near = make_clip((1, 1, 2, 8, 8), torch.uint8).to(device_for(backend))
    memory = torch.empty(2**31 + 64, dtype=torch.uint8, device=near.device)
    far = memory.as_strided(near.shape, (0, 0, 2**31, 8, 1)).copy_(near)
    with ops.use_backend(backend):
        assert torch.equal(*(ops.tubelet_patchify(c, None, 1, 4, MEAN[:1], STD[:1]) for c in (near, far)))
        assert torch.equal(*(ops.patch_mean(c, 2, 4, MEAN[:1], STD[:1]) for c in (near, far)))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("shape", "tubelet", "patch"),
    [
        ((2, 3, 4, 32, 48), 2, 16),
        ((1, 3, 2, 28, 42), 2, 14),
        ((2, 1, 1, 6, 9), 1, 3),
        ((1, 2, 8, 66, 33), 4, 33),
        ((1, 3, 2, 16, 16 * 19), 2, 16),
    ],
)
def test_patch_mean(backend, dtype, shape, tubelet, patch):
    assert_mean_parity(backend, make_clip(shape, dtype), tubelet, patch)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_gradients(backend, dtype):
    clip, idx = torch.randn(2, 3, 4, 8, 12), torch.tensor([[0, 11, 3], [5, 5, 2]])
    assert_parity(lambda c, i: ops.tubelet_patchify(c, i, 2, 4), [clip, idx], backend=backend, dtype=dtype, wrt=(0,))
    assert_parity(lambda c: ops.tubelet_patchify(c, None, 2, 4), [clip], backend=backend, dtype=dtype, wrt=(0,))
    assert_mean_parity(backend, clip.to(dtype), 2, 4, wrt=(0,))


@pytest.mark.parametrize("backend", BACKENDS)
def test_one_token_and_nothing_to_do(backend):
    """One token, whose row is the clip but no view of it; no token; no sample."""
    with ops.use_backend(backend):
        one = make_clip((1, 3, 2, 4, 4), torch.float32).to(device_for(backend))
        out = ops.tubelet_patchify(one, None, 2, 4)
        assert torch.equal(out.flatten(), one.flatten()) and out.data_ptr() != one.data_ptr()
        clip = make_clip((2, 3, 4, 8, 8), torch.uint8).to(device_for(backend))
        none = torch.empty(2, 0, dtype=torch.int64, device=clip.device)
        assert ops.tubelet_patchify(clip, none, 2, 4).shape == (2, 0, 96)
        assert ops.tubelet_patchify(clip[:0], none[:0], 2, 4).shape == (0, 0, 96)
        assert ops.patch_mean(clip[:0], 2, 4).shape == (0, 2, 2, 2, 3)


def test_opcheck_and_compile(backend):
    idx, mean, std = torch.tensor([[7, 0, 3], [2, 4, 5]], device=device_for(backend)), list(MEAN), list(STD)

    def fn(c, i):
        return ops.tubelet_patchify(c, i, 2, 4, mean, std).float().sum() + ops.patch_mean(c, 2, 4, mean, std).sum()

    with ops.use_backend(backend):
        for dtype, i in ((torch.uint8, None), (torch.float32, idx)):
            clip = make_clip((2, 3, 4, 8, 8), dtype).to(idx.device).requires_grad_(dtype.is_floating_point)
            torch.library.opcheck(_patchify, (clip, i, 2, 4, mean, std, torch.bfloat16))
            torch.library.opcheck(_patch_mean, (clip, 2, 4, mean, std))
        compiled = torch.compile(fn, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(clip, idx), fn(clip, idx))
        torch.testing.assert_close(*(torch.autograd.grad(f(clip, idx), clip)[0] for f in (fn, compiled)))


def test_what_a_backend_leaves_to_eager(backend):
    clip = make_clip((1, 3, 2, 4, 4), torch.float32).to(device_for(backend))
    with ops.use_backend(backend):
        with pytest.raises(ops.BackendError, match=f"tubelet_patchify.*{backend} writes float32, bfloat16"):
            ops.tubelet_patchify(clip, None, 2, 4, out_dtype=torch.float64)
        for fn in (lambda c: ops.tubelet_patchify(c, None, 2, 4), lambda c: ops.patch_mean(c, 2, 4)):
            with pytest.raises(ops.BackendError, match=f"{backend} reads clips of uint8, float32, bfloat16"):
                fn(clip.double())
    half = make_clip((1, 3, 2, 4, 4), torch.float16)
    assert torch.equal(ops.tubelet_patchify(half, None, 2, 4).flatten(), half.flatten())  # auto finds one that can
    if backend == "triton":
        assert_same_bits(backend, half, None, 2, 2)


def test_tokens_outside_the_grid_on_the_cpu(backend):
    clip, idx = make_clip((1, 3, 2, 4, 8), torch.uint8), torch.tensor([[-1, 2]])
    if device_for(backend) == "cpu":
        with ops.use_backend(backend), pytest.raises(ValueError, match=r"token indices in \[0, 2\), got \[-1, 2\]"):
            ops.tubelet_patchify(clip, idx, 2, 4)
    if backend == "cpp":  # called without the op around it
        table, out = torch.ones(3), torch.empty(1, 2, 96)
        with pytest.raises(RuntimeError, match="outside the grid"):
            torch.ops.vjepa_fast_cpp.tubelet_patchify(clip, idx, 2, 4, table, table, out)


def test_tokens_outside_the_grid_are_not_read_by_triton():
    kernel = pytest.importorskip("vjepa_fast.kernels.patchify")
    device = device_for("triton")
    table, out = torch.ones(3, device=device), torch.zeros(1, 3, 96, device=device)
    for batch, outside in ((1, 2), (2, 4)):
        clip = make_clip((batch, 3, 2, 4, 8), torch.uint8).to(device)
        kernel.tubelet_patchify(clip, torch.tensor([[-1, 1, outside]], device=device), 2, 4, table, table, out)
        assert out.isnan().all(-1).tolist() == [[True, False, True]] and not out[:, 1].isnan().any()


def test_other_samples_and_threads_do_not_change_the_bits(backend):
    clip = make_clip((3, 3, 4, 32, 32), torch.float32).to(device_for(backend))
    threads = torch.get_num_threads()

    def run(c):
        return ops.tubelet_patchify(c, None, 2, 16, out_dtype=torch.bfloat16), ops.patch_mean(c, 2, 16)

    with ops.use_backend(backend):
        whole = run(clip)
        try:
            torch.set_num_threads(2)
            assert all(torch.equal(a, b) for a, b in zip(whole, run(clip)))
        finally:
            torch.set_num_threads(threads)
        for b in range(3):
            assert all(torch.equal(a[b], x[0]) for a, x in zip(whole, run(clip[b : b + 1])))
