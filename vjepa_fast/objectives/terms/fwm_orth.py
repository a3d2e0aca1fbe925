"""Factorised world model, orthogonality: appearance and dynamics uncorrelated (arXiv:2605.17165, FWM-JEPA).

C = A^T Y / (M - 1) with A, Y the centred appearance and dynamics channels of all M context tokens of a mask;
mean of C^2.  Images and masks with one row are left out, as published.
"""

from __future__ import annotations

from dataclasses import dataclass

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
            real = state.real(view.i, view.j)
            if real is None and z_MD.shape[0] < 2:
                continue
            z_MD, free, present = _centred(z_MD, real)
            app, dyn = (part(z_MD, self.app_ratio, self.split, ctx.levels) for part in (appearance, dynamics))
            entries.append(((app.t() @ dyn / free).square().mean(), present))
        return mean_of_entries(entries, state.outputs("z"))


def _centred(z_MD: Tensor, real: Tensor | None) -> tuple[Tensor, Tensor | int, Tensor | None]:
    """(rows minus their mean, number of rows - 1, 1 if that is over 0 or None for always); filler stays out, as 0."""
    if real is None:
        return z_MD - z_MD.mean(0), len(z_MD) - 1, None
    rows, real_M1 = real.sum(), real.view(-1, 1)
    mean = z_MD.masked_fill(~real_M1, 0.0).sum(0) / rows
    return (z_MD - mean).masked_fill(~real_M1, 0.0), (rows - 1).clamp(min=1), (rows > 1).to(z_MD.dtype)
