"""What is done to features before they are classified: a shift and a scale taken from base clips, then L2.

No labels are read: these are the mean and the standard deviation per dimension, not a whitening by classes.
Shapes: n samples, d features.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from vjepa_fast.errors import DataError
from vjepa_fast.evaluation.choices import check_choice
from vjepa_fast.evaluation.extract.features import Features

TRANSFORMS = ("none", "centre", "standard", "centre+l2", "standard+l2")
# a dimension is constant where its standard deviation is below these shares: of its mean (rounding), of the largest one
OF_MEAN, OF_LARGEST = 1e-5, 1e-6


@dataclass(frozen=True)
class Transform:
    """``x -> (x - shift) * scale``, then divided by its norm for "+l2"; shift and scale float64 ``[d]``, or 0 and 1."""

    name: str
    shift: np.ndarray | float = field(default=0.0, repr=False)
    scale: np.ndarray | float = field(default=1.0, repr=False)

    @classmethod
    def fit(cls, name: str, base: Features | None) -> Transform:
        """The transform ``name`` of `TRANSFORMS` by the features of base clips (``none`` needs none).

        Dimensions that are constant in ``base`` up to rounding get a scale of 0 in "standard". Raises DataError without
        base clips or where their features are not finite.
        """
        check_choice("transform", name, TRANSFORMS)
        if name == "none":
            return cls(name)
        if base is None or len(base) == 0:
            raise DataError(f"{base.name if base else name}: no base clips to take mean and standard deviation of")
        base.check_finite()
        shift = base.x.mean(0, dtype=np.float64)
        if name.startswith("centre"):
            return cls(name, shift)
        std = base.x.std(0, dtype=np.float64)
        varies = std > np.maximum(OF_MEAN * np.abs(shift), OF_LARGEST * std.max(initial=0.0))
        return cls(name, shift, np.divide(1.0, std, out=np.zeros_like(std), where=varies))

    def __call__(self, features: Features) -> Features:
        """The transformed features, float32 ``[n, d]``."""
        x = (features.x - self.shift) * self.scale
        if self.name.endswith("+l2"):
            norm = np.linalg.norm(x, axis=1, keepdims=True)
            x = np.divide(x, norm, out=np.zeros_like(x), where=norm > 0)
        return Features(x, features.y, features.name)
