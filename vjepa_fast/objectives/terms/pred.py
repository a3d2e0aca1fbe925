"""Prediction: the predictor's output at the masked tokens against the target (V-JEPA, arXiv:2404.08471, eq. 1)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from vjepa_fast.objectives.api import Objective, TermContext, number, objective
from vjepa_fast.objectives.reduce import mean_of_entries, mean_of_tokens
from vjepa_fast.objectives.rows import power_error
from vjepa_fast.objectives.state import LatentState
from vjepa_fast.ops.latent import RowCall


@objective("pred")
@dataclass(frozen=True)
class Pred(Objective):
    """mean abs(z_pred - h)^p / p, with p = `loss_exp`."""

    access = "TOKEN"
    needs = frozenset({"z_pred", "h", "masks_pred"})
    gradient_to = "z_pred (h)"
    published = {"loss_exp": "loss.loss_exp"}

    loss_exp: float = number(1.0, low=1.0)

    @classmethod
    def from_published(cls, values: dict[str, Any], file: Mapping[str, Any]) -> dict[str, Any] | None:
        return values  # always on

    def lower(self, ctx: TermContext) -> tuple[RowCall, ...]:
        return (power_error(self.loss_exp),)

    def value(self, state: LatentState, head: nn.Module | None, ctx: TermContext) -> Tensor:
        errors = state.prediction_errors(*self.lower(ctx))
        pairs = [(e, mask) for es, masks in zip(errors, state.masks_pred) for e, mask in zip(es, masks)]
        values = [mean_of_tokens(e, mask) for e, mask in pairs if e.numel()]
        return mean_of_entries([(v, None) for v in values], state.outputs("z_pred"))
