"""Hard-region weighting: prediction errors weighted by how large they are (arXiv:2605.17165, HW-JEPA).

    e_bk = prediction error of a token;  w_bk = K softmax over k of (e_bk / temp), a constant;  mean of w_bk e_bk

The softmax is taken per sample, over its predicted tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from vjepa_fast.objectives.api import Objective, TermContext, number, objective
from vjepa_fast.objectives.reduce import hard_mean, mean_of_entries
from vjepa_fast.objectives.rows import power_error
from vjepa_fast.objectives.state import LatentState
from vjepa_fast.ops.latent import RowCall


@objective("hw")
@dataclass(frozen=True)
class HardRegion(Objective):
    """e_k = error of a predicted token, w_k = K softmax_k(e_k/temp) per sample, constant; mean w_k e_k."""

    access = "TOKEN"
    needs = frozenset({"z_pred", "h", "masks_pred"})
    gradient_to = "z_pred (h), weights constant"
    exact_gradient = False
    published = {"coeff": "optimization.hw_coeff", "temp": "optimization.hw_temp", "loss_exp": "loss.loss_exp"}

    temp: float = number(1.0, low=0.0)
    loss_exp: float = number(1.0, low=1.0)

    def lower(self, ctx: TermContext) -> tuple[RowCall, ...]:
        return (power_error(self.loss_exp),)

    def value(self, state: LatentState, head: nn.Module | None, ctx: TermContext) -> Tensor:
        errors = state.prediction_errors(*self.lower(ctx))
        pairs = [(e, mask) for es, masks in zip(errors, state.masks_pred) for e, mask in zip(es, masks)]
        values = [hard_mean(e, self.temp, mask) for e, mask in pairs if e.numel()]
        return mean_of_entries([(v, None) for v in values], state.outputs("z_pred"))
