"""The views of `method: levjepa`: how many, of the same frames, their colours, and what the loader gives."""

import dataclasses

import numpy as np
import pytest
import torch

from vjepa_fast.config.schema import AugmentConfig, LevjepaConfig
from vjepa_fast.data import ClipLoader
from vjepa_fast.data.views.multi import Colours, multi_views, random_colours, recoloured

AUG = AugmentConfig(random_resize_scale=(0.8, 1.0))
OWN = LevjepaConfig(local_views=4, local_crop=16)
LUMA = np.array([0.299, 0.587, 0.114])


def noise(frames=3, height=40, width=60, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (frames, height, width, 3), dtype=np.uint8)


def test_one_global_and_several_local_views_of_the_same_frames():
    """Each frame has a grey of its own, which neither mirroring nor recolouring with equal factors can hide."""
    clip = np.broadcast_to((20 + 40 * np.arange(5, dtype=np.uint8))[:, None, None, None], (5, 40, 60, 3)).copy()
    plain = dataclasses.replace(OWN, jitter=0.0)
    whole, local = multi_views(clip, np.random.default_rng(0), AUG, plain, 32)
    assert (whole.shape, local.shape) == ((3, 5, 32, 32), (4, 3, 5, 16, 16))
    assert whole.dtype == local.dtype == torch.uint8 and whole.is_contiguous() and local.is_contiguous()
    for view in (whole, *local):
        assert torch.equal(view, torch.from_numpy(clip[:, :1, :1].transpose(3, 0, 1, 2)).expand_as(view))
    first = whole.float().mean((0, 2, 3))
    for view in multi_views(clip, np.random.default_rng(1), AUG, OWN, 32)[1]:  # recoloured, the order of frames stays
        assert view.float().mean((0, 2, 3)).diff().sign().tolist() == first.diff().sign().tolist()


def test_the_global_view_is_a_crop_and_nothing_else():
    """Of an image whose red is its column and green its row, so that crop and mirroring can be read off."""
    rows, columns = np.mgrid[0:40, 0:60]
    clip = np.stack([4 * columns, 4 * rows, 0 * rows], -1).astype(np.uint8)[None]
    aug = dataclasses.replace(AUG, horizontal_flip=1.0)
    areas, mirrored = [], []
    for seed in range(40):
        whole, local = multi_views(
            clip, np.random.default_rng(seed), aug, dataclasses.replace(OWN, jitter=0, grey=0), 32
        )
        x = whole[:, 0].float()
        assert (x[0].diff(dim=1) >= 0).all() and (x[1].diff(dim=0) >= 0).all() and x[2].max() == 0  # not mirrored
        for view in local[:, :, 0].float():
            mirrored.append(bool((view[0].diff(dim=1) <= 0).all()))
            width, height = (float(v.max() - v.min()) / 4 + 1 for v in (view[0], view[1]))
            areas.append(width * height / (40 * 60))
    assert all(mirrored)
    assert min(areas) < 0.05 and 0.3 < max(areas) < 0.43  # of levjepa.local_scale, as the edges of a view tell it


def by_the_book(clip, c):
    """The five changes one after the other in float64, each as it is defined."""
    x = clip.numpy().astype(np.float64).reshape(3, -1) * c.brightness
    mean = (LUMA @ x).mean()
    x = c.contrast * x + (1 - c.contrast) * mean
    x = c.saturation * x + (1 - c.saturation) * (LUMA @ x)
    yiq = np.array([[0.299, 0.587, 0.114], [0.595716, -0.274453, -0.321263], [0.211456, -0.522591, 0.311135]])
    y, i, q = yiq @ x
    turned = (i + 1j * q) * np.exp(2j * np.pi * c.hue)
    x = np.linalg.solve(yiq, np.stack([y, turned.real, turned.imag]))
    x = np.broadcast_to(LUMA @ x, x.shape) if c.grey else x
    return torch.from_numpy(np.clip(np.floor(x + 0.5), 0, 255).astype(np.uint8).reshape(clip.shape))


@pytest.mark.parametrize(
    "colours",
    [
        Colours(brightness=1.3137),
        Colours(contrast=0.6),
        Colours(saturation=0.0),
        Colours(hue=0.1),
        Colours(grey=True),
        Colours(0.7, 1.4, 1.2, -0.08),
        Colours(0.9, 1.2, 0.8, 0.05, grey=True),
    ],
)
def test_colours_are_the_five_changes_in_turn(colours):
    clip = torch.from_numpy(noise().transpose(3, 0, 1, 2).copy())
    found, want = recoloured(clip, colours), by_the_book(clip, colours)
    assert (found.int() - want.int()).abs().max() <= 1 and (found != want).float().mean() < 0.01  # float32 rounds
    assert (found != clip).any() and torch.equal(recoloured(clip, Colours()), clip)


def test_how_often_and_how_far_colours_change():
    rng, own = np.random.default_rng(0), LevjepaConfig()
    drawn = [random_colours(rng, own) for _ in range(4000)]
    changed = [c for c in drawn if c.brightness != 1.0]
    assert len(changed) / 4000 == pytest.approx(0.8, abs=0.02)
    assert sum(c.grey for c in drawn) / 4000 == pytest.approx(0.2, abs=0.02)
    for name, low, high in (
        ("brightness", 0.6, 1.4),
        ("contrast", 0.6, 1.4),
        ("saturation", 0.8, 1.2),
        ("hue", -0.1, 0.1),
    ):
        values = np.array([getattr(c, name) for c in changed])
        assert low <= values.min() < low + 0.01 * (high - low) and high - 0.01 * (high - low) < values.max() <= high
        assert values.mean() == pytest.approx((low + high) / 2, abs=0.02 * (high - low))
    assert len({(c.brightness, c.contrast) for c in drawn}) > 3000  # each by itself


def test_views_are_a_function_of_the_generator():
    first, again, other = (multi_views(noise(), np.random.default_rng(s), AUG, OWN, 32) for s in (5, 5, 6))
    assert all(torch.equal(a, b) for a, b in zip(first, again))
    assert not torch.equal(first[0], other[0]) and not torch.equal(first[1], other[1])
    assert not torch.equal(first[1][0], first[1][1])


def batches(cfg, count, **options):
    with ClipLoader(cfg, **options) as loader:
        return [next(loader).groups[0] for _ in range(count)]


def same(a, b):
    return all(
        torch.equal(x.clip, y.clip) and torch.equal(x.local, y.local) and x.paths == y.paths for x, y in zip(a, b)
    )


def test_the_loader_gives_views_that_depend_on_seed_and_sample_alone(tiny_suites, make_config):
    cfg = make_config(tiny_suites["motion8"]["train"], aug=AUG)
    (plain,) = batches(cfg, 1)
    cfg = dataclasses.replace(cfg, method="levjepa", levjepa=OWN)
    whole = batches(cfg, 4)
    assert plain.local is None and whole[0].local.shape == (4, 4, 3, 8, 16, 16) and whole[0].local.dtype == torch.uint8
    assert whole[0].clip.shape == plain.clip.shape and whole[0].paths == plain.paths
    threads = dataclasses.replace(cfg, data=dataclasses.replace(cfg.data, num_workers=2, cache_mb=50))
    assert same(whole, batches(threads, 4)) and same(whole[2:], batches(cfg, 2, start_step=2))
    assert not same(whole, batches(dataclasses.replace(cfg, seed=6), 4))
    half = dataclasses.replace(cfg, data=dataclasses.replace(cfg.data, batch_size=2))
    ranks = [batches(half, 1, rank=rank, world=2)[0] for rank in range(2)]
    assert torch.equal(torch.cat([r.local for r in ranks]), whole[0].local)


def test_a_still_image_is_repeated_in_every_view(tiny_suites, make_config):
    cfg = make_config(tiny_suites["objects"]["train"], aug=AUG)
    (group,) = batches(dataclasses.replace(cfg, method="levjepa", levjepa=OWN), 1)
    assert group.local.shape == (4, 4, 3, 8, 16, 16)
    assert torch.equal(group.local, group.local[:, :, :, :1].expand_as(group.local))
