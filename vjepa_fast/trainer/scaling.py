"""Scaling of the loss under ``runtime.dtype: float16``, whose small gradients would become 0 (arXiv:1710.03740)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from vjepa_fast.errors import TrainingError

GROWTH, BACKOFF, INTERVAL = 2.0, 0.5, 2000  # torch's
START, LEAST = 65536.0, 2.0**-24
# What torch's GradScaler saves before its first step. The published trainer asks for it in every checkpoint.
FRESH = {
    "scale": START,
    "growth_factor": GROWTH,
    "backoff_factor": BACKOFF,
    "growth_interval": INTERVAL,
    "_growth_tracker": 0,
}


class Scaler:
    """The rule of ``torch.amp.GradScaler``: the scale doubles after 2,000 good steps and is halved after an overflow.

    It is a number of the host, which reads the norm of the gradients once a step, and so waits for the device.
    """

    def __init__(self) -> None:
        self.scale, self.good = START, 0

    def up(self, loss: Tensor) -> Tensor:
        """The loss [] to take gradients of."""
        return loss * self.scale

    def down(self, norm: Tensor) -> tuple[Tensor, float | None]:
        """(norm, factor) of gradients of this norm []: that without the scale, and what to multiply them by.

        Where they are not finite the norm is 0 and there is no factor: the step is to be skipped.

        Raises:
            TrainingError: they are not finite at any scale.
        """
        if norm.isfinite():
            factor = 1.0 / self.scale
            self.good += 1
            if self.good == INTERVAL:
                self.scale, self.good = self.scale * GROWTH, 0
            return norm * factor, factor
        self.scale, self.good = self.scale * BACKOFF, 0
        if self.scale < LEAST:
            raise TrainingError(
                "runtime.dtype: float16: gradients are not finite at any scale of the loss; use bfloat16 or float32"
            )
        return torch.zeros_like(norm), None

    def aside(self, norm: Tensor) -> Tensor:
        """The norm of `down`, of gradients that are dropped whatever they are: the scale stays."""
        return torch.where(norm.isfinite(), norm / self.scale, 0.0)

    def state_dict(self) -> dict[str, Any]:
        """As ``torch.amp.GradScaler`` has it."""
        return {**FRESH, "scale": self.scale, "_growth_tracker": self.good}

    def load_state_dict(self, state: Mapping[str, Any] | None) -> None:
        """Take over what this class or torch's saved; nothing of a run without a scaler."""
        if state:
            self.scale, self.good = float(state["scale"]), int(state["_growth_tracker"])
