"""Multi-block masks that all follow the motion of the clip (arXiv:2605.17165, motion-guided masking)."""

from __future__ import annotations

import dataclasses
from typing import Any

from vjepa_fast.config.schema import MasksConfig
from vjepa_fast.masks.api import STRATEGIES
from vjepa_fast.masks.blocks import MaskSampler


@STRATEGIES.register("motion")
class MotionMaskSampler(MaskSampler):
    """As ``blocks`` with ``motion_guided`` in every spec; each spec keeps its strength and random share."""

    def __init__(self, cfg: MasksConfig, **settings: Any) -> None:
        guided = tuple(dataclasses.replace(spec, motion_guided=True) for spec in cfg.specs)
        super().__init__(dataclasses.replace(cfg, specs=guided), **settings)
