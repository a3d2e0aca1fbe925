"""motion_saliency: the published maps, their properties, and every backend against eager code."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from tests.draws import given, settings, st
from tests.ops.clip_cases import AVAILABLE, DTYPES, STD, VIEWS, assert_clip_parity, make_clip
from tests.ops.parity import BACKENDS, KERNELS, device_for
from vjepa_fast import ops
from vjepa_fast.errors import ConfigError
from vjepa_fast.ops import motion_saliency

GOLDENS = Path(__file__).parents[1] / "goldens"
MODES = ["trilinear", "area"]


@pytest.fixture(scope="module")
def golden():
    with np.load(GOLDENS / "masks.npz") as file:
        return {name: file[name] for name in file.files if name.startswith("motion/")}


@pytest.fixture(params=BACKENDS)
def saliency(request):
    """motion_saliency of CPU clips, on each backend."""

    def fn(clip, *args, **kwargs):
        with ops.use_backend(request.param):
            return motion_saliency(clip.to(device_for(request.param)), *args, **kwargs).cpu()

    return fn


def small_clip(golden):
    return torch.from_numpy(golden["motion/small/video_u8"]).float()


def batch_of_eight(golden):
    generator = torch.Generator().manual_seed(777)
    clip = torch.randint(0, 40, (8, 3, 16, 112, 112), generator=generator).float()
    for b in range(8):
        for t in range(16):
            top, left = 8 + (3 * t + 7 * b) % 60, 10 + 8 * b
            clip[b, :, t, top : top + 28, left : left + 24] += 40.0 * (b + 1)
    clip[5] = clip[5, :, :1]
    assert clip.double().sum().item() == pytest.approx(float(golden["motion/b8/input_sum_f64"]), rel=1e-12)
    return clip


def test_small_clip_matches_golden(golden, saliency):
    got = saliency(small_clip(golden), (8, 7, 7))
    torch.testing.assert_close(got, torch.from_numpy(golden["motion/small/map"]), rtol=1e-5, atol=1e-6)


def test_each_sample_is_scaled_by_its_own_maximum(golden, saliency):
    clip = batch_of_eight(golden)
    got = saliency(clip, (8, 7, 7), normalize="sample")
    torch.testing.assert_close(got, torch.from_numpy(golden["motion/b8/map_per_sample"]), rtol=1e-5, atol=1e-6)
    assert got[5].eq(0).all()  # the still clip


def test_published_normalisation_mixes_samples_and_times(golden, saliency):
    clip = batch_of_eight(golden)
    got = saliency(clip, (8, 7, 7), normalize="published")
    want = torch.from_numpy(golden["motion/b8/map_LITERAL_BUGGY"])
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)
    assert got[:, 5].max() > 1e6  # slice 5 of every sample was divided by the floor of still sample 5
    alone = saliency(clip[:1], (8, 7, 7), normalize="published")
    assert torch.equal(alone, saliency(clip[:1], (8, 7, 7)))
    with pytest.raises(ConfigError, match="batch of 1 or of 8"):
        saliency(clip[:2], (8, 7, 7), normalize="published")


def test_large_maps(golden, saliency):
    generator = torch.Generator().manual_seed(4321)
    noise = torch.randn(2, 3, 16, 224, 224, generator=generator)
    np.testing.assert_array_equal(noise.flatten()[:16].numpy(), golden["motion/large/input_head"])
    got = saliency(noise, (8, 14, 14))
    torch.testing.assert_close(got, torch.from_numpy(golden["motion/large/map"]), rtol=1e-5, atol=1e-6)
    blob = 0.2 * noise
    for t in range(16):
        blob[0, :, t, 20 + 8 * t : 60 + 8 * t, 40:100] += 2.0
        blob[1, :, t, 120:180, 10 + 10 * t : 50 + 10 * t] -= 1.5
    got = saliency(blob, (8, 14, 14))
    torch.testing.assert_close(got, torch.from_numpy(golden["motion/large_blob/map"]), rtol=1e-5, atol=1e-6)


def test_static_clip_and_single_frame_are_zero(golden, saliency):
    still = torch.randint(0, 255, (1, 3, 1, 112, 112), dtype=torch.uint8).expand(-1, -1, 16, -1, -1)
    got = saliency(still, (8, 7, 7), None, (0.2, 0.2, 0.2))
    np.testing.assert_array_equal(got.numpy(), golden["motion/static/map"])
    assert saliency(still[:, :, :1], (1, 7, 7)).eq(0).all()


@pytest.mark.parametrize(
    ("frames", "size", "grid"),
    [(16, (96, 64), (8, 6, 4)), (5, (33, 47), (2, 5, 7)), (4, (8, 8), (4, 8, 8)), (2, (6, 9), (5, 8, 12))],
)
def test_trilinear_is_interpolate_of_the_whole_difference(frames, size, grid):
    clip = torch.randn(2, 3, frames, *size, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    change = clip.diff(dim=2).abs().mean(1, keepdim=True)
    change = torch.cat([change[:, :, :1], change], dim=2)
    for mode, kwargs in (("trilinear", {"align_corners": False}), ("area", {})):
        want = F.interpolate(change, size=grid, mode=mode, **kwargs)[:, 0]
        want = want / want.amax((1, 2, 3), keepdim=True)
        got = motion_saliency(clip, grid, mode=mode)
        assert got.dtype == torch.float64
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("mode", MODES)
def test_uint8_equals_its_normalised_float(mode):
    mean, std = (0.485, 0.456, 0.406), (0.1, 0.2, 0.4)
    clip = torch.randint(0, 256, (2, 3, 8, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    shape = (1, 3, 1, 1, 1)
    normalised = (clip / 255.0 - torch.tensor(mean).view(shape)) / torch.tensor(std).view(shape)
    got = motion_saliency(clip, (4, 4, 4), mean, std, mode=mode)
    torch.testing.assert_close(got, motion_saliency(normalised, (4, 4, 4), mode=mode), rtol=1e-5, atol=1e-6)
    assert math.isclose(got.amax(), 1.0)


def test_unknown_modes_are_refused():
    clip = torch.zeros(1, 3, 2, 8, 8)
    with pytest.raises(ConfigError, match="trilinear"):
        motion_saliency(clip, (1, 2, 2), mode="cubic")
    with pytest.raises(ConfigError, match="sample"):
        motion_saliency(clip, (1, 2, 2), normalize="batch")


@pytest.fixture(params=KERNELS)
def backend(request):
    return request.param


def check(backend, clip, grid, mode, normalize="sample", view=lambda x: x):
    def op(c, mean, std):
        return ops.motion_saliency(c, grid, mean, std, mode, normalize)

    assert_clip_parity(op, clip, backend=backend, view=view)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("shape", "grid"),
    [
        ((2, 3, 4, 32, 48), (2, 2, 3)),
        ((1, 3, 2, 28, 42), (1, 2, 3)),
        ((1, 1, 3, 6, 9), (3, 6, 9)),  # a token per pixel
        ((2, 2, 5, 33, 27), (2, 3, 4)),  # cells overlap
        ((1, 3, 2, 3, 9), (3, 4, 12)),  # more tokens than pixels
        ((1, 3, 2, 4, 16 * 19), (1, 1, 19)),
    ],
)
def test_parity(backend, mode, dtype, shape, grid):
    check(backend, make_clip(shape, dtype), grid, mode)


@settings(max_examples=5, deadline=None, derandomize=True, database=None)
@given(data=st.data())
def test_shapes(data):
    draw = lambda *x: data.draw(st.integers(*x))  # noqa: E731
    shape = (draw(1, 2), draw(1, 4), draw(2, 6), draw(1, 20), draw(1, 20))
    grid, dtype = (draw(1, 3), draw(1, 3), draw(1, 5)), data.draw(st.sampled_from(DTYPES))
    for backend in AVAILABLE:
        for mode in MODES:
            check(backend, make_clip(shape, dtype, seed=shape[3]), grid, mode)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("batch", [1, 4])
def test_published_normalisation(backend, mode, batch):
    clip = make_clip((batch, 2, 8, 8, 12), torch.uint8)
    for b in range(batch):
        clip[b] //= b + 1  # maxima differ
    check(backend, clip, (4, 1, 3), mode, "published")
    with ops.use_backend(backend):
        clip = clip.to(device_for(backend))
        published, mine = (ops.motion_saliency(clip, (4, 1, 3), None, None, mode, n) for n in ("published", "sample"))
    assert torch.equal(published, mine) == (batch == 1)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("view", VIEWS)
def test_strided_clips(backend, mode, view):
    clip = make_clip((2, 3, 4, 8, 12), torch.uint8)
    assert not VIEWS[view](clip).is_contiguous()
    check(backend, clip, (2, 2, 3), mode, view=VIEWS[view])


@pytest.mark.parametrize("mode", MODES)
def test_still_clips_and_empty_batches(backend, mode):
    with ops.use_backend(backend):
        clip = make_clip((2, 3, 1, 8, 8), torch.uint8).to(device_for(backend)).expand(-1, -1, 4, -1, -1)
        assert ops.motion_saliency(clip, (2, 2, 2), mode=mode).eq(0).all()  # and no division by 0
        assert ops.motion_saliency(clip[:, :, :1], (1, 2, 2), mode=mode).eq(0).all()
        assert ops.motion_saliency(clip[:0], (2, 2, 2), mode=mode).shape == (0, 2, 2, 2)


def test_one_cell_of_many_pixels(backend):
    check(backend, make_clip((1, 1, 2, 512, 512), torch.uint8), (1, 1, 2), "area")


@pytest.mark.parametrize("mode", MODES)
def test_offsets_beyond_32_bits(backend, mode):
    near = make_clip((1, 1, 2, 8, 8), torch.uint8).to(device_for(backend))
    memory = torch.empty(2**31 + 64, dtype=torch.uint8, device=near.device)
    far = memory.as_strided(near.shape, (0, 0, 2**31, 8, 1)).copy_(near)
    with ops.use_backend(backend):
        assert torch.equal(*(ops.motion_saliency(c, (2, 2, 2), mode=mode) for c in (near, far)))


@pytest.mark.parametrize("mode", MODES)
def test_other_samples_and_threads_do_not_change_the_bits(backend, mode):
    clip = make_clip((3, 3, 4, 32, 32), torch.float32).to(device_for(backend))
    threads = torch.get_num_threads()
    with ops.use_backend(backend):
        whole = ops.motion_saliency(clip, (2, 2, 2), mode=mode)
        try:
            torch.set_num_threads(2)
            assert torch.equal(ops.motion_saliency(clip, (2, 2, 2), mode=mode), whole)
        finally:
            torch.set_num_threads(threads)
        for b in range(3):
            assert torch.equal(ops.motion_saliency(clip[b : b + 1], (2, 2, 2), mode=mode)[0], whole[b])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("mode", MODES)
def test_opcheck_and_compile(backend, mode):
    op, std = torch.ops.vjepa_fast.motion_saliency.default, list(STD[:3])
    with ops.use_backend(backend):
        for dtype in DTYPES[:2]:
            clip = make_clip((2, 3, 4, 8, 12), dtype).to(device_for(backend))
            torch.library.opcheck(op, (clip, [2, 4, 3], std, mode, "sample"))
        fn = lambda c: ops.motion_saliency(c, (2, 4, 3), None, std, mode) * 2  # noqa: E731
        assert torch.equal(torch.compile(fn, fullgraph=True, backend="aot_eager")(clip), fn(clip))


def test_what_a_backend_leaves_to_eager(backend):
    clip = make_clip((1, 3, 2, 4, 4), torch.float64).to(device_for(backend))
    with ops.use_backend(backend), pytest.raises(ops.BackendError, match=f"{backend} reads clips of uint8, float32"):
        ops.motion_saliency(clip, (1, 2, 2))
    assert ops.motion_saliency(clip, (1, 2, 2)).dtype == torch.float64
