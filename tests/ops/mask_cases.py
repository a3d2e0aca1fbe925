"""Specs and draws for the tests of sample_block_masks."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from tests.draws import st
from tests.ops.parity import DEVICE, device_for, moved
from vjepa_fast import ops
from vjepa_fast.ops import BlockMasks, BlockSpec, sample_block_masks
from vjepa_fast.ops import _philox as philox
from vjepa_fast.ops import block_masks as module

GOLDENS = Path(__file__).parents[1] / "goldens"
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


def one_block(spec, seed, samples, saliency=None, grid=GRID):
    """Origins (start, top, left) of single-block masks, read back from the predicted tokens."""
    masks = sample_block_masks(samples, grid, [spec], saliency, seed=seed, step=0, truncate="none")
    assert masks.pred_len.unique().numel() == 1
    first = masks.pred[0, :, 0]
    return torch.stack([first // (grid[1] * grid[2]), first // grid[2] % grid[1], first % grid[2]], dim=1)


@st.composite
def scales(draw, low, high):
    ends = draw(st.lists(st.floats(low, high), min_size=2, max_size=2))
    return min(ends), max(ends)


@st.composite
def block_specs(draw):
    return BlockSpec(
        num_blocks=draw(st.integers(1, 5)),
        spatial_scale=draw(scales(0.01, 0.6)),
        temporal_scale=draw(scales(0.01, 1.0)),
        aspect_ratio=draw(scales(0.3, 3.0)),
        max_temporal_keep=draw(st.floats(0.1, 1.0)),
        max_keep=draw(st.none() | st.integers(1, 50)),
        full_complement=draw(st.booleans()),
        pred_full_complement=draw(st.booleans()),
        inv_block=draw(st.booleans()),
        motion_guided=draw(st.booleans()),
        motion_guided_strength=draw(st.sampled_from([0.0, 0.5, 2.0, 7.3])),
        motion_guided_random_rate=draw(st.sampled_from([0.0, 0.1, 1.0])),
    )


def drawn_origins(backend, saliency, spec, count):
    """(flat origins of blocks drawn under the map [T,H,W], their uniforms, the block's size)."""
    grid = tuple(saliency.shape)
    if backend == "triton" and DEVICE == "cpu":
        count //= 5  # interpreted
    (size,) = module.sample_block_sizes(grid, [spec], seed=3, step=4)
    if backend == "triton":  # many blocks of one sample: the kernel returns where it put them
        from vjepa_fast.kernels import block_masks as kernel

        item = torch.arange(count)
        words = philox.words(3, 4, torch.zeros_like(item), module._stream(philox.ORIGIN, 0, item))[3]
        many = module._flatten(replace(spec, num_blocks=count))
        call = module._Call(saliency[None], 1, grid, many, [3, 4, 0, 0], "batch", torch.device(DEVICE))
        table = module._kernel_table(call, module._draws(call))
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


def philox_by_hand(counter, key):
    """Plain integers, straight from the paper."""
    c, k = list(counter), list(key)
    for _ in range(10):
        p0, p1 = 0xD2511F53 * c[0], 0xCD9E8D57 * c[2]
        c = [(p1 >> 32) ^ c[1] ^ k[0], p1 & 0xFFFFFFFF, (p0 >> 32) ^ c[3] ^ k[1], p0 & 0xFFFFFFFF]
        k = [(k[0] + 0x9E3779B9) & 0xFFFFFFFF, (k[1] + 0xBB67AE85) & 0xFFFFFFFF]
    return c
