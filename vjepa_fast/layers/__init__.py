"""Layers that models are made of: linear layers, the transformer block, attention, packed token streams."""

from vjepa_fast.layers.packed import Packed

__all__ = ["Packed"]
