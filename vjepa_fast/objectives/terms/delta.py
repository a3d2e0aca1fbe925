"""Delta prediction: context features should change over time as the target does (arXiv:2605.17165, Delta-JEPA).

    mean over pairs and channels of abs((z(t+1) - z(t)) - (h(t+1) - h(t))), h detached
"""
from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from ..api import Objective, objective
from ..reduce import mean_of_entries


@objective("delta")
@dataclass(frozen=True)
class Delta(Objective):
    access = "PAIR"
    needs = frozenset({"z", "h", "masks_enc", "grids"})
    gradient_to = "z"

    def value(self, state, head, ctx) -> Tensor:
        entries = [view.mean((view.z_step - view.h_step).abs().mean(-1)) for view in state.temporal()]
        return mean_of_entries(entries, state.outputs("z"))
