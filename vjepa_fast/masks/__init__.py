"""Which tokens are context and which are predicted."""
from .blocks import MaskSampler

__all__ = ["MaskSampler"]
