"""Action conditioning: a small head reads the change of the mean colour of a patch (arXiv:2605.17165, AC-JEPA).

mean over pairs and colours of abs(head(z(t)) - (y(t+1) - y(t))), y = mean of the normalised clip over a tubelet
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from vjepa_fast import ops
from vjepa_fast.objectives.api import Objective, TermContext, choice, mlp, number, objective
from vjepa_fast.objectives.channels import head_input, head_width, published_channels
from vjepa_fast.objectives.reduce import Entry, mean_of_entries
from vjepa_fast.objectives.state import LatentState, take_rows


@objective("ac")
@dataclass(frozen=True)
class ActionConditioned(Objective):
    """mean over pairs of abs(head(z(t)) - (y(t+1) - y(t))), y = mean colour of a tubelet."""

    access = "PAIR"
    needs = frozenset({"z", "clips", "masks_enc", "grids"})
    gradient_to = "z, head"
    published = {
        "coeff": "optimization.ac_coeff",
        "target_dim": "optimization.ac_target_dim",
        "hidden_dim": "optimization.ac_hidden_dim",
        "app_ratio": "optimization.fwm_app_ratio",
    }

    target_dim: int = number(3, low=1, high=3)
    hidden_dim: int = number(256, low=1, most=1_000_000)
    channels: str = choice("all", "all", "dynamics")
    app_ratio: float = number(0.5, above=0.0, below=1.0)

    @classmethod
    def from_published(cls, values: dict[str, Any], file: Mapping[str, Any]) -> dict[str, Any] | None:
        return super().from_published(published_channels(values, file), file)

    def build_head(self, ctx: TermContext, generator: torch.Generator) -> nn.Module:
        return mlp(head_width(self.channels, self.app_ratio, ctx), self.hidden_dim, self.target_dim, generator)

    def value(self, state: LatentState, head: nn.Module | None, ctx: TermContext) -> Tensor:
        assert head is not None
        entries: list[Entry] = []
        for view in state.temporal():
            colour_BNC = state.once(("colour", view.i), partial(_colours, state, view.i))
            change_BKC = view.step(take_rows(colour_BNC, view.idx))[..., : self.target_dim]
            guess_BKC = head(head_input(view.features, self.channels, self.app_ratio, ctx))
            entries.append(view.mean((guess_BKC - change_BKC.to(guess_BKC.dtype)).abs().mean(-1)))
        return mean_of_entries(entries, [*state.outputs("z"), *head.parameters()])


def _colours(state: LatentState, i: int) -> Tensor:
    """Mean colour of each token of group ``i``, [B, N, C], detached."""
    clip = state.clips[i].detach()
    t, height, _ = state.grids[i]
    y = ops.patch_mean(clip, clip.shape[2] // t, clip.shape[3] // height, state.mean, state.std)
    return y.flatten(1, 3)
