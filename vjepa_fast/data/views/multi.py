"""Several views of one clip: a global crop, and small local ones, each mirrored and recoloured by itself (LeVJEPA,
arXiv:2608.27395; by multi-crop, as LeJEPA, arXiv:2511.08544). uint8 in, uint8 out.

Brightness, contrast, saturation, hue and grey are linear in RGB, one after the other, so a view's colours change by one
3 x 3 matrix and one shift for all frames. Values are rounded and cut to 0..255 once, at the end, not after each of the
five; hue turns the plane of equal luma (YIQ), not the hexagon of HSV.

Shapes: V local views, F frames, S crop size of a view.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np
import torch

from vjepa_fast.config.schema import AugmentConfig, LevjepaConfig
from vjepa_fast.data.views.augment import apply_view, random_view

_LUMA = np.array([0.299, 0.587, 0.114])
_YIQ = np.array([_LUMA, [0.595716, -0.274453, -0.321263], [0.211456, -0.522591, 0.311135]])
_RGB = np.linalg.inv(_YIQ)


@dataclass(frozen=True)
class Colours:
    """Changes of a view's colours: factors, turns of the colour circle, and whether it ends in grey."""

    brightness: float = 1.0
    contrast: float = 1.0
    saturation: float = 1.0
    hue: float = 0.0
    grey: bool = False

    def matrix(self) -> np.ndarray:
        """Float64 [3,3] that multiplies RGB columns: all but the contrast."""
        grey = np.broadcast_to(_LUMA, (3, 3))
        if self.grey:
            return self.brightness * grey
        turn = 2 * math.pi * self.hue
        plane = np.array([[1, 0, 0], [0, math.cos(turn), -math.sin(turn)], [0, math.sin(turn), math.cos(turn)]])
        faded = self.saturation * np.eye(3) + (1 - self.saturation) * grey
        return self.brightness * (_RGB @ plane @ _YIQ @ faded)


def random_colours(generator: np.random.Generator, cfg: LevjepaConfig) -> Colours:
    """Drawn as ``jitter``, ``brightness``, ``contrast``, ``saturation``, ``hue`` and ``grey`` say; always as many
    numbers.
    """
    changed, *at, grey = generator.random(6).tolist()
    factors = [1 + x * (2 * u - 1) for x, u in zip((cfg.brightness, cfg.contrast, cfg.saturation), at)]
    if changed >= cfg.jitter:
        return Colours(grey=grey < cfg.grey)
    return Colours(*factors, hue=cfg.hue * (2 * at[3] - 1), grey=grey < cfg.grey)


def recoloured(clip: torch.Tensor, colours: Colours) -> torch.Tensor:
    """uint8 ``[3,F,S,S]`` -> the same shape; contrast is about the mean luma of the view."""
    if colours == Colours():
        return clip
    x = clip.numpy().reshape(3, -1).astype(np.float32)
    matrix = colours.matrix()
    middle = float(_LUMA @ matrix @ x.mean(1, dtype=np.float64)) * (1 - colours.contrast)
    out = (colours.contrast * matrix).astype(np.float32) @ x
    out += np.float32(middle + 0.5)  # cut to whole numbers below: rounds to the nearest
    np.clip(out, 0, 255, out=out)
    return torch.from_numpy(out.astype(np.uint8).reshape(clip.shape))


def multi_views(
    clip: np.ndarray, generator: np.random.Generator, aug: AugmentConfig, cfg: LevjepaConfig, crop_size: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """The views of a decoded clip, a function of the generator's state.

    Args:
        clip: uint8 ``[F,H,W,3]``.
        generator: of the sample.
        aug: scale of the global view, aspect ratio of all, and how often a local one is mirrored; the global one is a
            crop alone.
        cfg: of the local views.
        crop_size: of the global view.

    Returns:
        The global view uint8 ``[3,F,S,S]`` and the local ones ``[V,3,F,s,s]``.
    """
    height, width = clip.shape[1:3]
    view = random_view(generator, height, width, replace(aug, horizontal_flip=0.0))
    whole = apply_view(clip, view, crop_size)
    local_aug, parts = replace(aug, random_resize_scale=cfg.local_scale), list[np.ndarray]()
    for _ in range(cfg.local_views):
        part = apply_view(clip, random_view(generator, height, width, local_aug), cfg.local_crop)
        parts.append(recoloured(part, random_colours(generator, cfg)).numpy())
    return whole, torch.from_numpy(np.stack(parts))
