"""Factorised world model, static part: appearance channels should not change over time (arXiv:2605.17165, FWM-JEPA)."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from vjepa_fast.layers.channels import level_norm
from vjepa_fast.objectives.api import Objective, TermContext, choice, flag, number, objective
from vjepa_fast.objectives.channels import appearance_window
from vjepa_fast.objectives.reduce import Entry, mean_of_entries
from vjepa_fast.objectives.rows import STEP
from vjepa_fast.objectives.state import LatentState
from vjepa_fast.ops.latent import RowCall


@objective("fwm_static")
@dataclass(frozen=True)
class FwmStatic(Objective):
    """mean over pairs and appearance channels of abs(z(t+1) - z(t))."""

    access = "PAIR"
    needs = frozenset({"z", "masks_enc", "grids"})
    gradient_to = "z"
    published = {
        "coeff": "optimization.fwm_static_coeff",
        "app_ratio": "optimization.fwm_app_ratio",
        "split": "optimization.fwm_split",
        "normalize": "optimization.fwm_normalize",
    }

    app_ratio: float = number(0.5, above=0.0, high=1.0)
    split: str = choice("depth", "depth", "channel")
    normalize: bool = flag(False)

    def lower(self, ctx: TermContext) -> tuple[RowCall, ...]:
        return () if self.normalize else (self._step(ctx),)  # normalised features are not z: a pass of their own

    def _step(self, ctx: TermContext) -> RowCall:
        return STEP(window=appearance_window(self.app_ratio, self.split, ctx))

    def value(self, state: LatentState, head: nn.Module | None, ctx: TermContext) -> Tensor:
        step = self._step(ctx)
        entries: list[Entry] = []
        for view in state.temporal():
            rows_BK = view.rows_of(level_norm(view.z, ctx.levels), step) if self.normalize else view.rows(step)
            entries.append(view.mean(rows_BK))
        return mean_of_entries(entries, state.outputs("z"))
