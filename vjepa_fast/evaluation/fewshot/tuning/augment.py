"""Views of clips for fine-tuning: one crop and flip per clip, then light or strong colour changes on that same crop.

All changes after the crop are of colour only, and one draw holds for all frames, so that a tubelet of the weak view and
the tubelet of the same index in the strong one show the same place at the same time. Shapes: B clips, F frames, S
pixels.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from vjepa_fast.errors import ConfigError

LUMA = (0.299, 0.587, 0.114)


@dataclass(frozen=True)
class Augment:
    """How clips are varied. Source of the pairing: SUN, arXiv:2203.07057, section 3.2.

    ``flip`` is a probability: 0 where left and right distinguish classes. ``weak`` and ``strong`` are the largest
    relative changes of brightness, contrast and saturation; ``grey`` and ``blur`` are probabilities of the strong view.
    """

    scale: tuple[float, float] = (0.5, 1.0)  # of the area
    ratio: tuple[float, float] = (0.75, 1.35)
    flip: float = 0.5
    weak: float = 0.1
    strong: float = 0.5
    grey: float = 0.2
    blur: float = 0.5

    def __post_init__(self):
        if wrong := [f"{k} {getattr(self, k)}" for k in ("flip", "grey", "blur") if not 0 <= getattr(self, k) <= 1]:
            raise ConfigError(f"views: {', '.join(wrong)}; expected chances from 0 to 1")


def cropped(clip: Tensor, generator: np.random.Generator, augment: Augment) -> Tensor:
    """Random resized crop and flip, one draw for all frames: uint8 ``[3, F, S, S]`` to the same shape."""
    from vjepa_fast.config.schema import AugmentConfig
    from vjepa_fast.data.views.augment import apply_view, random_view

    config = AugmentConfig(augment.ratio, augment.scale, augment.flip)
    view = random_view(generator, clip.shape[-2], clip.shape[-1], config)
    return apply_view(clip.permute(1, 2, 3, 0).numpy(), view, clip.shape[-1])


def coloured(
    clip: Tensor, generator: np.random.Generator, strength: float, grey: float = 0.0, blur: float = 0.0
) -> Tensor:
    """Brightness, contrast and saturation times 1 - ``strength`` to 1 + ``strength``; by chance grey, by chance
    blurred. uint8 ``[3, F, S, S]`` to the same shape; nothing moves.
    """
    brightness, contrast, saturation = generator.uniform(1 - strength, 1 + strength, 3)
    make_grey, make_blur, sigma = generator.random() < grey, generator.random() < blur, generator.uniform(0.1, 2.0)
    x = clip.float() * brightness
    x = (x - x.mean()) * contrast + x.mean()
    luma = (x * torch.tensor(LUMA)[:, None, None, None]).sum(0)
    x = luma + (x - luma) * (0.0 if make_grey else saturation)
    if make_blur:
        x = _blurred(x, sigma * clip.shape[-1] / 224)
    return x.round_().clamp_(0, 255).to(torch.uint8)


def _blurred(x: Tensor, sigma: float) -> Tensor:
    """Gaussian blur over space, ``sigma`` in pixels; edges repeat."""
    radius = min(math.ceil(3 * sigma), x.shape[-1] - 1)
    weight = torch.exp(-0.5 * (torch.arange(-radius, radius + 1) / max(sigma, 1e-3)) ** 2)
    weight = weight / weight.sum()
    flat = x.flatten(0, 1)[:, None]
    flat = torch.nn.functional.pad(flat, (radius,) * 4, mode="replicate")
    flat = torch.nn.functional.conv2d(flat, weight.view(1, 1, 1, -1))
    return torch.nn.functional.conv2d(flat, weight.view(1, 1, -1, 1))[:, 0].view_as(x)


def weak_views(clips: Tensor, generator: np.random.Generator, augment: Augment) -> Tensor:
    """Crop, flip and light colour of each clip: uint8 ``[B, 3, F, S, S]`` to the same shape."""
    return torch.stack([coloured(cropped(c, generator, augment), generator, augment.weak) for c in clips])


def paired_views(clips: Tensor, generator: np.random.Generator, augment: Augment) -> tuple[Tensor, Tensor]:
    """(weak, strong) views uint8 ``[B, 3, F, S, S]`` of clips of that shape: the same crop, flip and frames."""
    weak, strong = [], []
    for clip in clips:
        crop = cropped(clip, generator, augment)
        weak.append(coloured(crop, generator, augment.weak))
        strong.append(coloured(crop, generator, augment.strong, augment.grey, augment.blur))
    return torch.stack(weak), torch.stack(strong)
