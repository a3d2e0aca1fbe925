"""Views of a clip: random resized crop and flip, one draw per clip, or the centre. uint8 in, uint8 out.

Shapes: F frames, H x W source pixels, S crop size.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch

from vjepa_fast.config.schema import AugmentConfig


@dataclass(frozen=True)
class View:
    """A box of the source, to be scaled to the crop size, and mirrored if ``flip``."""

    top: int
    left: int
    height: int
    width: int
    flip: bool = False


def random_view(generator: np.random.Generator, height: int, width: int, aug: AugmentConfig) -> View:
    """Random resized crop: area and log aspect ratio uniform, ten attempts, then the largest centred box whose ratio is
    allowed; mirrored with the given probability.
    """
    low, high = aug.random_resize_aspect_ratio
    flip = bool(generator.random() < aug.horizontal_flip)
    for _ in range(10):
        area = height * width * generator.uniform(*aug.random_resize_scale)
        ratio = math.exp(generator.uniform(math.log(low), math.log(high)))
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            top, left = int(generator.integers(height - h + 1)), int(generator.integers(width - w + 1))
            return View(top, left, h, w, flip)
    ratio = min(max(width / height, low), high)
    h, w = min(height, max(1, round(width / ratio))), min(width, max(1, round(height * ratio)))
    return View((height - h) // 2, (width - w) // 2, h, w, flip)


def centre_view(height: int, width: int, crop_size: int) -> View:
    """The view for evaluation: a centred square of 224/256 of the shorter side, as if that side were scaled to
    crop_size * 256/224 and cropped; the whole side where the source is no larger than that.
    """
    short = min(height, width)
    side = max(1, round(short * 224 / 256)) if short > crop_size * 256 / 224 else short
    return View((height - side) // 2, (width - side) // 2, side, side)


def crop_views(height: int, width: int, crop_size: int, crops: int) -> list[View]:
    """Views of one picture for evaluation: the centre view, or ``crops`` squares of the whole shorter side, evenly from
    one end of the longer side to the other (as V-JEPA 2 takes three; all the same where the picture is square).
    """
    if crops == 1:
        return [centre_view(height, width, crop_size)]
    side, room = min(height, width), abs(height - width)
    starts = [i * room // (crops - 1) for i in range(crops)]
    return [View(s, 0, side, side) if height > width else View(0, s, side, side) for s in starts]


def apply_view(clip: np.ndarray, view: View, crop_size: int) -> torch.Tensor:
    """uint8 ``[F, H, W, 3]`` -> uint8 ``[3, F, S, S]``, contiguous; bilinear, antialiased when it shrinks."""
    box = clip[:, view.top : view.top + view.height, view.left : view.left + view.width]
    if view.flip:
        box = box[:, :, ::-1]
    box_FCHW = torch.from_numpy(np.ascontiguousarray(box)).permute(0, 3, 1, 2)
    if box_FCHW.shape[-2:] != (crop_size, crop_size):
        box_FCHW = torch.nn.functional.interpolate(
            box_FCHW, size=(crop_size, crop_size), mode="bilinear", align_corners=False, antialias=True
        )
    # numpy copies in this thread; torch's copy would call its thread team for each clip, which costs more than it saves
    return torch.from_numpy(np.ascontiguousarray(box_FCHW.permute(1, 0, 2, 3).numpy()))
