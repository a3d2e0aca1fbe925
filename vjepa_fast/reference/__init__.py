"""The published algorithm, written plainly, step for step: the oracle of tests and the baseline of benchmarks.

Nothing here is fast, and nothing outside tests, benchmarks and ``vjepa-fast bench`` imports it.
"""

from vjepa_fast.reference.masks import MaskCollator, MaskGenerator, motion_map
from vjepa_fast.reference.model import Encoder, Predictor
from vjepa_fast.reference.step import ReferenceStep, build_reference
from vjepa_fast.reference.total import Losses

__all__ = [
    "Encoder",
    "Losses",
    "MaskCollator",
    "MaskGenerator",
    "Predictor",
    "ReferenceStep",
    "build_reference",
    "motion_map",
]
