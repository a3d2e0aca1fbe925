"""Latent temporal contrast: z(t) closer to h(t) than to h(t+1) by a margin (arXiv:2605.17165, LTC-JEPA).

    mean over pairs of max(0, margin - cos(z(t), h(t)) + cos(z(t), h(t+1))), cosines over all D channels, h detached
"""
from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor
from torch.nn import functional as F

from ..api import Objective, number, objective
from ..reduce import mean_of_entries


@objective("ltc")
@dataclass(frozen=True)
class TemporalContrast(Objective):
    access = "PAIR"
    needs = frozenset({"z", "h", "masks_enc", "grids"})
    gradient_to = "z"

    margin: float = number(0.5)

    def value(self, state, head, ctx) -> Tensor:
        entries = []
        for view in state.temporal():
            now = F.cosine_similarity(view.z, view.h, dim=-1, eps=1e-8)
            later = F.cosine_similarity(view.z, view.h_after, dim=-1, eps=1e-8)
            entries.append(view.mean((self.margin - now + later).clamp(min=0)))
        return mean_of_entries(entries, state.outputs("z"))
