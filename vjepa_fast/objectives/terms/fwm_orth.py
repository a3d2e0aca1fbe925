"""Factorised world model, orthogonality: appearance and dynamics uncorrelated (arXiv:2605.17165, FWM-JEPA).

C = A^T Y / (M - 1) with A, Y the centred appearance and dynamics channels of all M context tokens of a mask;
mean of C^2.  Images and masks with one row are left out, as published.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from vjepa_fast.layers.channels import appearance, dynamics, level_norm
from vjepa_fast.objectives.api import Objective, TermContext, choice, flag, number, objective
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
        entries: list[Entry] = []
        for view in state.temporal():
            z_MD = (level_norm(view.z, ctx.levels) if self.normalize else view.z).flatten(0, 1)
            if view.stream is not None:
                rows_S = view.stream.counts
                for own_M, rows in zip(view.stream.own[..., None], rows_S):
                    z = torch.where(own_M, z_MD, 0.0)
                    z = torch.where(own_M, z - z.sum(0) / rows, 0.0)
                    entries.append((self._square(z, (rows - 1).clamp(min=1), ctx), rows > 1))
            elif (rows := z_MD.shape[0]) > 1:
                entries.append((self._square(z_MD - z_MD.mean(0), rows - 1, ctx), None))
        return mean_of_entries(entries, state.outputs("z"))

    def _square(self, z_MD: Tensor, free: Tensor | int, ctx: TermContext) -> Tensor:
        """Mean square of the covariance of centred rows."""
        app, dyn = (part(z_MD, self.app_ratio, self.split, ctx.levels) for part in (appearance, dynamics))
        return (app.t() @ dyn / free).square().mean()
