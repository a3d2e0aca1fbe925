"""Prediction: the predictor's output at the masked tokens against the target (V-JEPA, arXiv:2404.08471, eq. 1).

mean over tokens and channels of abs(z_pred - h)^p / p, then over groups and masks
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from vjepa_fast.objectives.api import Objective, number, objective
from vjepa_fast.objectives.reduce import mean_of_entries
from vjepa_fast.objectives.rows import power_error


@objective("pred")
@dataclass(frozen=True)
class Pred(Objective):
    access = "TOKEN"
    needs = frozenset({"z_pred", "h", "masks_pred"})
    gradient_to = "z_pred (h)"

    loss_exp: float = number(1.0, low=1.0)

    def lower(self, ctx):
        return (power_error(self.loss_exp),)

    def value(self, state, head, ctx) -> Tensor:
        errors = state.prediction_errors(*self.lower(ctx))
        return mean_of_entries([(e.mean(), None) for es in errors for e in es if e.numel()], state.outputs("z_pred"))
