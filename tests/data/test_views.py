"""Views: random ones as published, one draw per clip, mirroring, scaling; the centre; several along a side."""

import numpy as np
import pytest
import torch

from vjepa_fast.config.schema import AugmentConfig
from vjepa_fast.data import eval_batches, load_manifest
from vjepa_fast.data.views.augment import View, apply_view, centre_view, crop_views, random_view
from vjepa_fast.data.views.evaluation import short_side
from vjepa_fast.errors import DataError


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


# ---------------------------------------------------------------- the geometry of the published evaluation


def bilinear(frame, high, wide):
    """Bilinear without antialias, corner pixels not aligned, in plain numpy."""

    def along(size, out):
        at = np.clip((np.arange(out) + 0.5) * size / out - 0.5, 0, size - 1)
        low = np.floor(at).astype(int)
        return low, np.minimum(low + 1, size - 1), at - low

    (y0, y1, fy), (x0, x1, fx) = along(frame.shape[0], high), along(frame.shape[1], wide)
    f, fy, fx = frame.astype(float), fy[:, None, None], fx[None, :, None]
    top, below = (f[y][:, x0] * (1 - fx) + f[y][:, x1] * fx for y in (y0, y1))
    return top * (1 - fy) + below * fy


@pytest.mark.parametrize(("height", "width", "scaled"), [(360, 640, (224, 398)), (250, 200, (280, 224))])
def test_the_whole_shorter_side_is_scaled_to_the_crop_without_antialias(height, width, scaled):
    clip = np.random.default_rng(0).integers(0, 256, (2, height, width, 3), dtype=np.uint8)
    out = short_side(clip, 224, still=False)
    assert out.shape == (3, 2, 224, 224) and out.dtype == torch.uint8 and out.is_contiguous()
    top, left = ((side - 224) // 2 for side in scaled)
    for f in range(2):
        want = bilinear(clip[f], *scaled)[top : top + 224, left : left + 224]
        assert np.abs(out[:, f].permute(1, 2, 0).numpy() - want).max() <= 0.51  # rounding to uint8
    ours = apply_view(clip, centre_view(height, width, 224), 224)
    assert (ours.float() - out.float()).abs().mean() > (15 if height == 360 else 0)


def test_pictures_are_scaled_bicubic_with_antialias():
    picture = np.random.default_rng(0).integers(90, 160, (1, 301, 423, 3), dtype=np.uint8)
    out = short_side(picture, 224, still=True)[:, 0].float()
    x = torch.from_numpy(picture).permute(0, 3, 1, 2).float()
    wide = int(224 * 423 / 301)
    want = torch.nn.functional.interpolate(x, size=(224, wide), mode="bicubic", antialias=True).clamp(0, 255)
    left = round((wide - 224) / 2)
    assert (out - want[0, :, :, left : left + 224]).abs().max() <= 1.5  # Pillow rounds after each of its two passes


def test_manifests_are_read_in_the_geometry_asked_for(tiny_suites, write_manifest, tmp_path):
    video = load_manifest(tiny_suites["motion8"]["test"])
    (native, _, _), *_ = eval_batches(video, 2, 16, 4, geometry="native")
    (short, _, _), *_ = eval_batches(video, 2, 16, 4, geometry="short_side")
    assert native.shape[-1] == native.shape[-2] != 16 and short.shape[-2:] == (16, 16)
    frames = native[0].permute(1, 2, 3, 0).numpy()
    assert torch.equal(short[0], short_side(frames, 16, still=False))
    from PIL import Image

    paths = [tmp_path / f"{i}.png" for i in range(2)]
    for i, path in enumerate(paths):
        Image.fromarray(np.full((20, 30 + i, 3), 100 * i, np.uint8)).save(path)
    pictures = load_manifest(write_manifest(paths))
    (clips, _, _), *_ = eval_batches(pictures, 4, 16, 2, geometry="short_side")
    assert clips.shape == (2, 3, 4, 16, 16) and (clips[1] == 100).all()
    with pytest.raises(DataError, match="unequal sizes .30x20, 31x20."):
        next(eval_batches(pictures, 4, 16, 2, geometry="native"))
    with pytest.raises(DataError, match="geometry 'native' with 3 crops"):
        next(eval_batches(pictures, 4, 16, 2, geometry="native", crops=3))
