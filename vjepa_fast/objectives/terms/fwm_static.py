"""Factorised world model, static part: appearance channels should not change over time (arXiv:2605.17165, FWM-JEPA).

    mean over pairs and appearance channels of abs(z(t+1) - z(t))
"""
from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from ..api import Objective, choice, flag, number, objective
from ..channels import appearance, level_norm
from ..reduce import mean_of_entries


@objective("fwm_static")
@dataclass(frozen=True)
class FwmStatic(Objective):
    access = "PAIR"
    needs = frozenset({"z", "masks_enc", "grids"})
    gradient_to = "z"

    app_ratio: float = number(0.5, above=0.0, high=1.0)
    split: str = choice("depth", "depth", "channel")
    normalize: bool = flag(False)

    def value(self, state, head, ctx) -> Tensor:
        entries = []
        for view in state.temporal():
            z_BKD = level_norm(view.z, ctx) if self.normalize else view.z
            z_app = appearance(z_BKD, self.app_ratio, self.split, ctx)
            entries.append(view.mean(view.step(z_app).abs().mean(-1)))
        return mean_of_entries(entries, state.outputs("z"))
