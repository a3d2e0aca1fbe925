"""sample_block_masks on every backend: the same masks as eager code, and guided origins as the analysis says."""

import json
import pathlib
from dataclasses import replace

import numpy as np
import pytest
import torch

from tests.draws import given, settings, st
from tests.ops.parity import BACKENDS, DEVICE, KERNELS, device_for, moved
from vjepa_fast import ops
from vjepa_fast.errors import ConfigError
from vjepa_fast.ops import BlockMasks, BlockSpec, _cpp, origin_probabilities
from vjepa_fast.ops import _philox as philox
from vjepa_fast.ops import block_masks as module

GOLDENS = pathlib.Path(__file__).parent.parent / "goldens"
GRID = (8, 14, 14)
M8, M2 = BlockSpec(), BlockSpec(num_blocks=2, spatial_scale=(0.7, 0.7))
GUIDED = [replace(spec, motion_guided=True) for spec in (M8, M2)]
# one block per time step: two of 4x3 on 4x4 places leave no context whenever they differ, half of the time
TIGHT = BlockSpec(num_blocks=2, spatial_scale=(0.75, 0.75), aspect_ratio=(4 / 3, 4 / 3))
SMALL = BlockSpec(num_blocks=1)
HOPELESS = BlockSpec(num_blocks=1, spatial_scale=(1.0, 1.0), aspect_ratio=(1.0, 1.0))
FIELDS = ("enc", "pred", "enc_len", "pred_len")


def maps(b, grid, seed=0):
    """Saliency with a peak and floor values, as of a clip in which little moves."""
    x = torch.rand(b, *grid, generator=torch.Generator().manual_seed(seed)) ** 4
    return (x - 0.05).clamp_min(0) / 0.95


def draw(backend, b, grid, specs, saliency=None, *, seed=1, step=0, **keys) -> BlockMasks:
    """Masks of a backend, on the CPU."""
    device = device_for(backend)
    saliency = None if saliency is None else moved(saliency, device)
    with ops.use_backend(backend):
        masks = ops.sample_block_masks(b, grid, specs, saliency, seed=seed, step=step, device=device, **keys)
    assert all(getattr(masks, f).device.type == device for f in FIELDS)
    return BlockMasks(*(getattr(masks, f).cpu() for f in FIELDS))


def assert_same(got, want):
    for field in FIELDS:
        a, b = getattr(got, field), getattr(want, field)
        assert a.dtype == b.dtype and torch.equal(a, b), field


@pytest.mark.parametrize("truncate", module.TRUNCATE)
@pytest.mark.parametrize("specs", [[M8, M2], [GUIDED[0], M2]])
@pytest.mark.parametrize("backend", KERNELS)
def test_equal_to_eager(backend, specs, truncate):
    saliency = maps(2, GRID) if specs[0].motion_guided else None
    keys = dict(seed=-5, step=1 << 31, first_sample=(3 << 32) - 1, first_spec=200, truncate=truncate)
    got = draw(backend, 2, GRID, specs, saliency, **keys)
    assert_same(got, draw("eager", 2, GRID, specs, saliency, **keys))


@pytest.mark.parametrize("truncate", module.TRUNCATE)
@pytest.mark.parametrize("backend", KERNELS)
def test_complements_swap_and_max_keep(backend, truncate):
    base = BlockSpec(num_blocks=2, spatial_scale=(0.3, 0.5), temporal_scale=(0.3, 0.9))
    specs = [
        replace(base, full_complement=full, pred_full_complement=pred_full, inv_block=swap, max_keep=keep)
        for full, pred_full in ((0, 0), (1, 0), (0, 1), (1, 1))
        for swap, keep in ((0, 7), (1, None))
    ]
    args = (2, (3, 5, 6), specs)
    assert_same(draw(backend, *args, truncate=truncate), draw("eager", *args, truncate=truncate))


@st.composite
def scales(draw, low, high):
    ends = draw(st.lists(st.floats(low, high), min_size=2, max_size=2))
    return min(ends), max(ends)


@st.composite
def block_specs(draw):
    return BlockSpec(
        num_blocks=draw(st.integers(1, 5)), spatial_scale=draw(scales(0.01, 0.6)),
        temporal_scale=draw(scales(0.01, 1.0)), aspect_ratio=draw(scales(0.3, 3.0)),
        max_temporal_keep=draw(st.floats(0.1, 1.0)), max_keep=draw(st.none() | st.integers(1, 50)),
        full_complement=draw(st.booleans()), pred_full_complement=draw(st.booleans()), inv_block=draw(st.booleans()),
        motion_guided=draw(st.booleans()), motion_guided_strength=draw(st.sampled_from([0.0, 0.5, 2.0, 7.3])),
        motion_guided_random_rate=draw(st.sampled_from([0.0, 0.1, 1.0])),
    )  # fmt: skip


@pytest.mark.parametrize("backend", KERNELS)
@settings(max_examples=6, deadline=None, derandomize=True)
@given(
    grid=st.tuples(st.integers(1, 5), st.integers(2, 12), st.integers(2, 12)),
    b=st.integers(1, 2),
    specs=st.lists(block_specs(), min_size=1, max_size=2),
    truncate=st.sampled_from(module.TRUNCATE),
    seed=st.integers(0, (1 << 64) - 1),
    step=st.integers(0, (1 << 32) - 1),
)
def test_any_grid_and_spec(backend, grid, b, specs, truncate, seed, step):
    keys = dict(seed=seed, step=step, truncate=truncate)
    saliency = maps(b, grid, seed % 1000)
    try:
        want = draw("eager", b, grid, specs, saliency, **keys)
    except ConfigError as error:
        with pytest.raises(ConfigError, match=str(error).split(":")[0].replace("[", r"\[")):
            draw(backend, b, grid, specs, saliency, **keys).trim()
    else:
        assert_same(draw(backend, b, grid, specs, saliency, **keys), want)


def drawn_origins(backend, saliency, spec, count):
    """(flat origins of blocks drawn under the map [T,H,W], their uniforms, the block's size)."""
    grid = tuple(saliency.shape)
    if backend == "triton" and DEVICE == "cpu":
        count //= 5  # interpreted
    (size,) = module.sample_block_sizes(grid, [spec], seed=3, step=4)
    if backend == "triton":  # many blocks of one sample: the kernel tells where it put them
        from vjepa_fast.kernels import masks as kernel

        item = torch.arange(count)
        words = philox.words(3, 4, torch.zeros_like(item), module._stream(philox.ORIGIN, 0, item))[3]
        many = module._flatten(replace(spec, num_blocks=count))
        *_, table = module._kernel_table(saliency[None], 1, grid, many, [3, 4, 0, 0], torch.device(DEVICE))
        table[:, -1] = 0  # no redraw of what must be empty
        scratch = torch.empty(2, 1, 1, saliency.numel(), dtype=torch.int64, device=DEVICE)
        corners = kernel.draw(saliency[None].to(DEVICE), table, grid, count, *scratch)[2].flatten().cpu()
        at = [corners >> 40, corners >> 20 & 0xFFFFF, corners & 0xFFFFF]
    else:
        sample = torch.arange(count)
        words = philox.words(3, 4, sample, torch.full_like(sample, module._stream(philox.ORIGIN, 0)))[3]
        batch = saliency.expand(count, *grid)
        masks = draw(backend, count, grid, [replace(spec, num_blocks=1)], batch, seed=3, step=4, truncate="none")
        first = masks.pred[0, :, 0]
        at = [first // (grid[1] * grid[2]), first // grid[2] % grid[1], first % grid[2]]
    tops, lefts = grid[1] - size[1] + 1, grid[2] - size[2] + 1
    return (at[0] * tops + at[1]) * lefts + at[2], (words >> 8).double() / 2**24, size


@pytest.mark.parametrize(
    ("grid", "scale", "time", "count", "strength", "rate"),
    [
        ((4, 14, 14), 0.15, 1.0, 2000, 5.5, 0.0),  # 100 origins or so
        (GRID, 0.001, 0.01, 1500, 2.0, 0.1),  # 1568: several passes of the kernel
    ],
)
@pytest.mark.parametrize("backend", BACKENDS)
def test_guided_origins_are_those_of_the_same_uniforms(backend, grid, scale, time, count, strength, rate):
    """The contract: 99.9 % equal, and different only where a draw is within 1e-6 of a step."""
    spec = BlockSpec(
        spatial_scale=(scale, scale),
        temporal_scale=(time, time),
        motion_guided=True,
        motion_guided_strength=strength,
        motion_guided_random_rate=rate,
    )
    saliency = maps(1, grid, 5)[0]
    got, u, size = drawn_origins(backend, saliency, spec, count)
    cdf = origin_probabilities(saliency, size, strength, rate).cumsum(0)
    want = torch.searchsorted(cdf, u, right=True).clamp_max(len(cdf) - 1)
    assert (got == want).double().mean() >= 0.999
    near = ((u - cdf[want]).abs() < 1e-6) | ((u - cdf[(want - 1).clamp_min(0)]).abs() < 1e-6)
    assert near[got != want].all()
    assert len(got.unique()) > 20  # not all in one place


@pytest.mark.parametrize("case", [12, 15])  # 169 and 780 origins
@pytest.mark.parametrize("backend", BACKENDS)
def test_guided_origins_follow_the_published_probabilities(backend, case):
    about = json.loads((GOLDENS / "masks_meta.json").read_text())["origin_cases"][case]
    with np.load(GOLDENS / "masks.npz") as file:
        name, sample = about["map"].split(":")
        saliency, want = torch.from_numpy(file[name])[int(sample)], file[f"origin/{case}/probs_f64"]
    spec = spec_of_size(about["block"], saliency.shape, about["strength"], about["random_rate"])
    got, _, size = drawn_origins(backend, saliency, spec, 3000)
    assert list(size) == about["block"]
    expected = want / want.sum() * len(got)
    group = np.unique((expected.cumsum() / 10).astype(int), return_inverse=True)[1]  # of successive origins, 10 draws
    group = np.minimum(group, group[-1] - 1)
    observed, expected = np.bincount(group[got.numpy()], minlength=group[-1] + 1), np.bincount(group, expected)
    assert len(expected) > 20
    assert chi_square(observed, expected) > 1e-3
    uniform = np.bincount(group) * len(got) / len(want)
    assert chi_square(observed, uniform) < 1e-6  # and they are not the unguided ones


def chi_square(observed, expected) -> float:
    """The p-value of counts; scipy has it too, but is not everywhere."""
    assert np.isclose(observed.sum(), expected.sum())
    statistic = torch.tensor(((observed - expected) ** 2 / expected).sum() / 2, dtype=torch.float64)
    return torch.special.gammaincc(torch.tensor((len(observed) - 1) / 2, dtype=torch.float64), statistic).item()


def spec_of_size(block, grid, strength, rate):
    t, h, w = block
    area, aspect = (h * w + 0.01) / (grid[1] * grid[2]), h / w
    return BlockSpec(
        spatial_scale=(area, area),
        temporal_scale=((t + 0.01) / grid[0] if t < grid[0] else 1.0,) * 2,
        aspect_ratio=(aspect, aspect),
        motion_guided=True,
        motion_guided_strength=strength,
        motion_guided_random_rate=rate,
    )


@pytest.mark.parametrize("backend", KERNELS)
def test_a_second_run_gives_the_same(backend):
    args = (backend, 2, (4, 6, 6), GUIDED, maps(2, (4, 6, 6)))
    assert_same(draw(*args, truncate="random"), draw(*args, truncate="random"))


@pytest.mark.parametrize("backend", KERNELS)
def test_a_map_larger_than_a_tile(backend):
    grid, specs = (5, 20, 30), [replace(GUIDED[0], temporal_scale=(0.4, 0.9), motion_guided_strength=1.3)]
    assert_same(draw(backend, 2, grid, specs, maps(2, grid)), draw("eager", 2, grid, specs, maps(2, grid)))


@pytest.mark.parametrize("backend", KERNELS)
def test_redraws_are_those_of_eager(backend):
    grid, specs = (2, 4, 4), [TIGHT, replace(TIGHT, motion_guided=True)]
    want = draw("eager", 6, grid, specs, maps(6, grid), truncate="none")
    assert want.enc_len.eq(8).all()  # without redraws half would be 0
    assert_same(draw(backend, 6, grid, specs, maps(6, grid), truncate="none"), want)


@pytest.mark.parametrize("truncate", module.TRUNCATE)
@pytest.mark.parametrize("backend", BACKENDS)
def test_no_context_is_an_error_that_names_the_mask(backend, truncate):
    with pytest.raises(ConfigError, match=r"masks.specs\[1\]: no context is left after 32 redraws.*; lower spatial"):
        draw(backend, 1, (2, 4, 4), [SMALL, HOPELESS], truncate=truncate).trim()


@pytest.mark.parametrize("flags", [{}, {"pred_full_complement": True, "inv_block": True}, {"full_complement": True}])
@pytest.mark.parametrize("truncate", module.TRUNCATE)
def test_lengths_of_0_tell_of_no_context_without_waiting(monkeypatch, truncate, flags):
    """A kernel cannot raise: both lengths are 0, of the sample, or of the spec where the batch is cut to one length."""
    pytest.importorskip("triton")
    monkeypatch.setattr(module, "MAX_REDRAWS", 0)
    got = draw("triton", 6, (2, 4, 4), [replace(TIGHT, **flags), SMALL], truncate=truncate)
    failed = got.enc_len[0] == 0
    assert torch.equal(failed, got.pred_len[0] == 0) and failed.any()
    assert failed.all() == (truncate != "none")
    assert not got.enc[0][failed].any() and not got.pred[0][failed].any()
    assert (got.enc_len[1] > 0).all() and (got.pred_len[1] > 0).all()
    with pytest.raises(ConfigError, match=r"masks.specs\[0\]: no context is left after 0 redraws"):
        got.trim()


@pytest.mark.parametrize("backend", KERNELS)
def test_saliency_may_be_strided(backend):
    saliency = maps(4, (14, 14, 4)).permute(0, 3, 1, 2)[::2]
    want = draw("eager", 2, (4, 14, 14), GUIDED, saliency)
    assert_same(draw(backend, 2, (4, 14, 14), GUIDED, saliency), want)
    assert_same(draw(backend, 2, (4, 14, 14), GUIDED, saliency.contiguous()), want)


@pytest.mark.parametrize("backend", KERNELS)
def test_float64_saliency_is_left_to_eager(backend):
    saliency = maps(1, (2, 6, 6)).double()
    with pytest.raises(ops.BackendError, match="block_masks cannot run on backend '.*float64"):
        draw(backend, 1, (2, 6, 6), GUIDED, saliency)
    assert_same(draw("auto", 1, (2, 6, 6), GUIDED, saliency), draw("eager", 1, (2, 6, 6), GUIDED, saliency))


def test_bfloat16_saliency_on_the_gpu():
    pytest.importorskip("triton")
    saliency = maps(2, (4, 6, 6)).bfloat16()
    assert_same(draw("triton", 2, (4, 6, 6), GUIDED, saliency), draw("eager", 2, (4, 6, 6), GUIDED, saliency.float()))


@pytest.mark.skipif(not _cpp.LOADED, reason=_cpp.REASON or "-")
def test_threads_do_not_matter():
    threads = torch.get_num_threads()
    want = draw("cpp", 9, GRID, GUIDED, maps(9, GRID), truncate="random")
    try:
        torch.set_num_threads(3)
        assert_same(draw("cpp", 9, GRID, GUIDED, maps(9, GRID), truncate="random"), want)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("guided", [False, True])
@pytest.mark.parametrize("backend", BACKENDS)
def test_opcheck_and_compile(backend, guided):
    device = torch.device(device_for(backend))
    saliency = maps(2, (2, 5, 6)).to(device) if guided else None
    specs = GUIDED if guided else [M8, M2]
    flat = [x for spec in specs for x in module._flatten(spec)]
    with ops.use_backend(backend):
        torch.library.opcheck(module._block_masks, (saliency, 2, [2, 5, 6], flat, [1, 2, 3, 0], "batch", device))

        def fn(x):
            masks = ops.sample_block_masks(2, (2, 5, 6), specs, x, seed=1, step=2, device=device)
            return masks.enc + 1, masks.pred_len

        compiled = torch.compile(fn, fullgraph=True, backend="aot_eager")
        assert all(torch.equal(a, b) for a, b in zip(compiled(saliency), fn(saliency)))


@pytest.mark.parametrize("backend", BACKENDS)
def test_bad_arguments(backend):
    with pytest.raises(ValueError, match="sample_block_masks: B: expected a positive int, got 0"):
        draw(backend, 0, GRID, [M8])
    with pytest.raises(ValueError, match=r"saliency: expected \[B,T,H,W\] = \[1, 8, 14, 14\], got \[2, 8, 14, 14\]"):
        draw(backend, 1, GRID, [M8], maps(2, GRID))
    with pytest.raises(ConfigError, match="masks.truncate"):
        draw(backend, 1, GRID, [M8], truncate="last")
    with pytest.raises(ValueError, match="saliency: expected device meta"), ops.use_backend(backend):
        ops.sample_block_masks(1, GRID, [M8], maps(1, GRID), seed=0, step=0, device="meta")
    with pytest.raises(ValueError, match="step must be in"):
        draw(backend, 1, GRID, [M8], step=1 << 32)
