"""Which tokens are context and which are predicted: mask strategies by name (``masks.strategy``)."""

from vjepa_fast.masks.api import STRATEGIES, MaskStrategy
from vjepa_fast.masks.blocks import MaskSampler
from vjepa_fast.masks.drawn import DrawnMasks

__all__ = ["STRATEGIES", "DrawnMasks", "MaskSampler", "MaskStrategy"]
