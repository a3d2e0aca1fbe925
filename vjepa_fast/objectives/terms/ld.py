"""Latent dynamics: a small head reads the change of the target from the context features (arXiv:2605.17165, LD-JEPA).

    mean over pairs and channels of abs(head(z(t)) - (h(t+1) - h(t))), h detached

With ``hard_weighting`` pair k has weight M softmax(m_k / temperature) over the M pairs of the batch (or of the sample),
m_k its mean error. The weights are constants. The published code computes the whole term without autograd then, so it
trains nothing; ``compat="published"`` reproduces that.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from vjepa_fast.objectives.api import Objective, choice, mlp, number, objective
from vjepa_fast.objectives.channels import head_input, head_width
from vjepa_fast.objectives.reduce import hard_softmax, mean_of_entries
from vjepa_fast.objectives.rows import L1


@objective("ld")
@dataclass(frozen=True)
class LatentDynamics(Objective):
    access = "PAIR"
    needs = frozenset({"z", "h", "masks_enc", "grids"})
    gradient_to = "z, head (published with hard_weighting: nothing)"

    hidden_dim: int = number(256, low=1)
    channels: str = choice("all", "all", "dynamics")
    app_ratio: float = number(0.5, above=0.0, below=1.0)
    hard_weighting: float | None = number(None, low=0.0)
    hard_scope: str = choice("batch", "batch", "sample")

    def build_head(self, ctx, generator):
        return mlp(head_width(self.channels, self.app_ratio, ctx), self.hidden_dim, ctx.dim, generator)

    def lower(self, ctx):
        return (L1(),)

    def value(self, state, head, ctx) -> Tensor:
        trains = not (ctx.compat == "published" and self.hard_weighting is not None)
        with torch.set_grad_enabled(torch.is_grad_enabled() and trains):
            entries = [self._entry(view, head, ctx) for view in state.temporal()]
            return mean_of_entries(entries, [*state.outputs("z"), *head.parameters()])

    def _entry(self, view, head, ctx) -> tuple[Tensor, Tensor]:
        change_BKD = head(head_input(view.z, self.channels, self.app_ratio, ctx))
        error_BK = view.target_rows(change_BKD, *self.lower(ctx), target="step")
        if self.hard_weighting is None:
            return view.mean(error_BK)
        if self.hard_scope == "batch":
            share = hard_softmax(error_BK.flatten(), self.hard_weighting, view.pair.flatten()).view_as(error_BK)
            return (share * error_BK).sum(), view.present
        share, pairs = view.hard_shares(error_BK, self.hard_weighting)
        return view.mean(share * error_BK * pairs)
