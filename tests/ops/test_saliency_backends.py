"""motion_saliency on every backend, held to the bound of eager code."""

import pytest
import torch

from tests.draws import given, settings, st
from tests.ops.clip_cases import AVAILABLE, DTYPES, STD, VIEWS, assert_clip_parity, make_clip
from tests.ops.parity import KERNELS, device_for
from vjepa_fast import ops

MODES = ["trilinear", "area"]


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
