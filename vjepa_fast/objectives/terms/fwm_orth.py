"""Factorised world model, orthogonality: appearance and dynamics uncorrelated (arXiv:2605.17165, FWM-JEPA).

C = A^T Y / (M - 1) with A, Y the centred appearance and dynamics channels of all M context tokens of a mask;
mean of C^2.  Images and masks with one row are left out, as published.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from vjepa_fast import ops
from vjepa_fast.layers.channels import level_norm
from vjepa_fast.objectives.api import Objective, TermContext, choice, flag, number, objective
from vjepa_fast.objectives.channels import appearance_window
from vjepa_fast.objectives.reduce import Entry, mean_of_entries
from vjepa_fast.objectives.state import LatentState


@objective("fwm_orth")
@dataclass(frozen=True)
class FwmOrth(Objective):
    """A, Y centred appearance and dynamics channels of the M context tokens of a mask; mean (A^T Y/(M-1))^2."""

    access = "GLOBAL"
    needs = frozenset({"z", "masks_enc", "grids"})
    gradient_to = "z"
    published = {
        "coeff": "optimization.fwm_orth_coeff",
        "app_ratio": "optimization.fwm_app_ratio",
        "split": "optimization.fwm_split",
        "normalize": "optimization.fwm_normalize",
    }

    app_ratio: float = number(0.5, above=0.0, below=1.0)
    split: str = choice("depth", "depth", "channel")
    normalize: bool = flag(False)

    def value(self, state: LatentState, head: nn.Module | None, ctx: TermContext) -> Tensor:
        _, width, period = appearance_window(self.app_ratio, self.split, ctx)
        entries: list[Entry] = []
        for view in state.temporal():
            z_BKD = level_norm(view.z, ctx.levels) if self.normalize else state.z[view.i][view.j]
            counts_S = None if view.stream is None else view.stream.counts
            offsets = None if counts_S is None else nn.functional.pad(counts_S.cumsum(0), (1, 0))
            covariances = ops.cross_covariance(z_BKD.flatten(0, 1), offsets, width, period)
            if counts_S is not None:
                for covariance, rows in zip(covariances, counts_S):
                    entries.append(((covariance / (rows - 1).clamp(min=1)).square().mean(), rows > 1))
            elif (rows := z_BKD.shape[:2].numel()) > 1:
                entries.append(((covariances[0] / (rows - 1)).square().mean(), None))
        return mean_of_entries(entries, state.outputs("z"))
