"""Which tokens are context and which are predicted."""

from vjepa_fast.masks.blocks import MaskSampler

__all__ = ["MaskSampler"]
