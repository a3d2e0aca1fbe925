"""Context: the predictor's output at the visible tokens against the target (V-JEPA 2.1's dense loss).

    mean over tokens and channels of abs(z_context - h)^p / p x w,  then over groups and masks

With ``weight_distance`` w = 1 / sqrt(distance to the nearest predicted token of the sample), always float32; else 1.
The coefficient rises linearly over ``warmup``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from vjepa_fast.config.fields import is_fraction, ramp
from vjepa_fast.errors import ConfigError
from vjepa_fast.objectives.api import Objective, TermContext, flag, number, objective
from vjepa_fast.objectives.reduce import Entry, mean_of_entries, mean_of_tokens
from vjepa_fast.objectives.rows import power_error
from vjepa_fast.objectives.state import LatentState
from vjepa_fast.ops.latent import RowCall

PUBLISHED_WARMUP = (15000, 30000)  # steps; fixed in the published code, whatever the length of the run


def _in_steps(v: int | float, total_steps: int | None) -> float:
    if not is_fraction(v) or v == 0:
        return v
    if total_steps is None:
        raise ValueError("objectives.context.warmup is a fraction of the run: LatentState.total_steps is needed")
    return v * total_steps


@objective("context")
@dataclass(frozen=True)
class Context(Objective):
    """mean abs(z_context - h)^p / p x w, with p = `loss_exp`; w = 1/sqrt(distance to the nearest predicted token) with
    `weight_distance`, else 1.
    """

    access = "TOKEN"
    needs = frozenset({"z_context", "h", "masks_enc", "masks_pred", "grids"})
    gradient_to = "z_context (h)"
    published = {
        "coeff": "model.lambda_value_vid",
        "coeff_img": "model.lambda_value_img",
        "loss_exp": "loss.loss_exp",
        "warmup": "model.lambda_progressive",
        "weight_distance": "loss.weight_distance_loss",
        "offset": "loss.offset_context_loss",
    }

    coeff_img: float | None = number(None, low=0.0)
    loss_exp: float = number(1.0, low=1.0)
    warmup: tuple[int | float, int | float] = ramp((0.5, 1.0))
    weight_distance: bool = flag(False)
    offset: bool = flag(False)

    @classmethod
    def from_published(cls, values: dict[str, Any], file: Mapping[str, Any]) -> dict[str, Any] | None:
        progressive = values.get("warmup", True)
        if not isinstance(progressive, bool):
            raise ConfigError(f"{cls.published['warmup']}: expected true or false, got {progressive!r}")
        fields = {"coeff": 0.0, "coeff_img": 0.0, "loss_exp": 1.0, "weight_distance": False, "offset": False, **values}
        fields["warmup"] = list(PUBLISHED_WARMUP) if progressive else [0, 0]
        if file.get("img_data") is None:
            del fields["coeff_img"]
        on = file.get("loss.predict_all", True) and (fields["coeff"] or fields.get("coeff_img"))
        return fields if on else None

    def weight(self, state: LatentState) -> float:
        coeff = self.coeff_img if state.modality == "image" and self.coeff_img is not None else self.coeff
        start, end = (_in_steps(v, state.total_steps) for v in self.warmup)
        if end == 0:
            return coeff
        if state.step is None:
            raise ValueError("objectives.context.warmup needs LatentState.step")
        if state.step >= end:
            return coeff
        return coeff * (state.step - start) / (end - start) if state.step > start else 0.0

    def lower(self, ctx: TermContext) -> tuple[RowCall, ...]:
        return (power_error(self.loss_exp),)

    def value(self, state: LatentState, head: nn.Module | None, ctx: TermContext) -> Tensor:
        entries: list[Entry] = []
        for i, errors in enumerate(state.context_errors(*self.lower(ctx))):
            for j, error_BK in enumerate(errors):
                if not error_BK.numel():
                    continue
                if self.weight_distance:
                    error_BK = error_BK * state.distance(i, j, self.offset).reciprocal().to(error_BK.dtype)
                entries.append((mean_of_tokens(error_BK, state.masks_enc[i][j]), None))
        return mean_of_entries(entries, state.outputs("z_context"))
