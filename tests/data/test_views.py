"""Views: random ones as published, one draw per clip, mirroring, scaling; the centre; several along a side."""

import numpy as np
import pytest
import torch

from vjepa_fast.config.schema import AugmentConfig
from vjepa_fast.data.views.augment import View, apply_view, centre_view, crop_views, random_view


def test_random_views_have_the_published_distribution():
    rng, aug = np.random.default_rng(0), AugmentConfig()
    views = [random_view(rng, 240, 320, aug) for _ in range(4000)]
    area = np.array([v.height * v.width for v in views]) / (240 * 320)
    ratio = np.array([v.width / v.height for v in views])
    assert area.min() >= 0.295 and area.max() <= 1.005 and ratio.min() >= 0.74 and ratio.max() <= 1.36
    assert abs(np.mean([v.flip for v in views]) - 0.5) < 0.03
    small = area < 0.6  # unaffected by what does not fit: uniform
    assert abs(area[small].mean() - 0.45) < 0.01
    assert abs(np.log(ratio[small]).mean() - (np.log(0.75) + np.log(1.35)) / 2) < 0.01
    assert all(0 <= v.top <= 240 - v.height and 0 <= v.left <= 320 - v.width for v in views)
    assert max(v.top + v.height for v in views) == 240 and min(v.left for v in views) == 0


def test_no_box_fits_falls_back_to_the_centre():
    view = random_view(np.random.default_rng(0), 10, 200, AugmentConfig(random_resize_scale=(1.0, 1.0)))
    assert (view.height, view.width, view.top, view.left) == (10, 14, 0, 93)


def test_one_draw_per_clip_crop_flip_and_layout():
    clip = np.random.default_rng(0).integers(0, 256, (4, 20, 30, 3), dtype=np.uint8)
    out = apply_view(clip, View(2, 5, 16, 16), 16)
    assert out.shape == (3, 4, 16, 16) and out.dtype == torch.uint8 and out.is_contiguous()
    assert np.array_equal(out.numpy(), clip[:, 2:18, 5:21].transpose(3, 0, 1, 2))
    flipped = apply_view(clip, View(2, 5, 16, 16, flip=True), 16)
    assert torch.equal(flipped, out.flip(-1))


@pytest.mark.parametrize("side", [16, 32, 57])
def test_scaling_is_bilinear_and_antialiased(side):
    ramp = np.broadcast_to(np.linspace(20, 220, 48).round()[None, None, :, None], (2, 48, 48, 3)).astype(np.uint8)
    out = apply_view(ramp, View(0, 0, 48, 48), side).float()
    want = torch.nn.functional.interpolate(
        torch.from_numpy(ramp).permute(0, 3, 1, 2).float(), size=(side, side), mode="bilinear", antialias=True
    ).permute(1, 0, 2, 3)
    assert (out - want).abs().max() <= 1.0  # rounding of uint8
    stripes = np.zeros((1, 64, 64, 3), np.uint8)
    stripes[:, :, ::2] = 255
    shrunk = apply_view(stripes, View(0, 0, 64, 64), 16)[:, :, :, 2:-2].float()
    assert (shrunk - 127.5).abs().max() < 20  # not aliased to black or white


def test_centre_view():
    assert centre_view(64, 64, 64) == View(0, 0, 64, 64)  # already small: nothing is thrown away
    assert centre_view(64, 80, 64) == View(0, 8, 64, 64)
    assert centre_view(256, 340, 224) == View(0, 42, 256, 256)
    assert centre_view(480, 640, 224) == View(30, 110, 420, 420)


def test_crops_go_along_the_longer_side():
    wide = crop_views(100, 180, 64, 3)
    assert [(v.top, v.left, v.height, v.width) for v in wide] == [
        (0, 0, 100, 100),
        (0, 40, 100, 100),
        (0, 80, 100, 100),
    ]
    assert [(v.top, v.left) for v in crop_views(180, 100, 64, 3)] == [(0, 0), (40, 0), (80, 0)]
    assert crop_views(100, 180, 64, 1) == [centre_view(100, 180, 64)]
