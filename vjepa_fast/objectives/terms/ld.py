"""Latent dynamics: a small head reads the change of the target from the context features (arXiv:2605.17165, LD-JEPA).

    mean over pairs and channels of abs(head(z(t)) - (h(t+1) - h(t))), h detached

With ``hard_weighting`` pair k has weight M softmax(m_k / temperature) over the M pairs of the batch (or of the sample),
m_k its mean error. The weights are constants. The published code computes the whole term without autograd then, so it
trains nothing; ``compat="published"`` reproduces that.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from vjepa_fast.objectives.api import Objective, TermContext, choice, mlp, number, objective
from vjepa_fast.objectives.channels import head_input, head_width, published_channels
from vjepa_fast.objectives.reduce import mean_of_entries
from vjepa_fast.objectives.rows import L1
from vjepa_fast.objectives.state import LatentState, TemporalView
from vjepa_fast.ops.latent import RowCall


@objective("ld")
@dataclass(frozen=True)
class LatentDynamics(Objective):
    """mean over pairs of abs(head(z(t)) - (h(t+1) - h(t))); with `hard_weighting` tau, pair weights
    M softmax(error/tau), constant, over the pairs of the batch or with `hard_scope` sample of each sample.
    """

    access = "PAIR"
    needs = frozenset({"z", "h", "masks_enc", "grids"})
    gradient_to = "z, head (published with hard_weighting: nothing)"
    published = {
        "coeff": "optimization.ld_coeff",
        "hidden_dim": "optimization.ld_hidden_dim",
        "app_ratio": "optimization.fwm_app_ratio",
        "hard_weighting": "optimization.hw_temp",
        "hard_scope": "optimization.hw_scope",
    }

    hidden_dim: int = number(256, low=1, most=1_000_000)
    channels: str = choice("all", "all", "dynamics")
    app_ratio: float = number(0.5, above=0.0, below=1.0)
    hard_weighting: float | None = number(None, low=0.0)
    hard_scope: str = choice("batch", "batch", "sample")

    @classmethod
    def from_published(cls, values: dict[str, Any], file: Mapping[str, Any]) -> dict[str, Any] | None:
        fields = published_channels(values, file)
        if file.get("optimization.hw_coeff", 0) > 0:  # the published code weights both by one switch
            fields.setdefault("hard_weighting", 1.0)
        else:
            fields = {k: v for k, v in fields.items() if k not in ("hard_weighting", "hard_scope")}
        return super().from_published(fields, file)

    def build_head(self, ctx: TermContext, generator: torch.Generator) -> nn.Module:
        return mlp(head_width(self.channels, self.app_ratio, ctx), self.hidden_dim, ctx.dim, generator)

    def lower(self, ctx: TermContext) -> tuple[RowCall, ...]:
        return (L1(),)

    def value(self, state: LatentState, head: nn.Module | None, ctx: TermContext) -> Tensor:
        assert head is not None
        trains = not (ctx.compat == "published" and self.hard_weighting is not None)
        views = [(view, view.features) for view in state.temporal()]  # kept for other terms: with their gradient
        with torch.set_grad_enabled(torch.is_grad_enabled() and trains):
            entries = [self._entry(view, z_BKD, head, ctx) for view, z_BKD in views]
            return mean_of_entries(entries, [*state.outputs("z"), *head.parameters()])

    def _entry(self, view: TemporalView, z_BKD: Tensor, head: nn.Module, ctx: TermContext) -> tuple[Tensor, Tensor]:
        change_BKD = head(head_input(z_BKD, self.channels, self.app_ratio, ctx))
        error_BK = view.target_rows(change_BKD, *self.lower(ctx), target="step")
        if self.hard_weighting is None:
            return view.mean(error_BK)
        if self.hard_scope == "batch":
            return view.total(view.hard_shares_of_all(error_BK, self.hard_weighting) * error_BK), view.present
        share, pairs = view.hard_shares(error_BK, self.hard_weighting)
        return view.mean(share * error_BK * pairs)
