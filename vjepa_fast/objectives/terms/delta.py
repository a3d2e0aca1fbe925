"""Delta prediction: context features should change over time as the target does (arXiv:2605.17165, Delta-JEPA)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from vjepa_fast.objectives.api import Objective, TermContext, objective
from vjepa_fast.objectives.reduce import mean_of_entries
from vjepa_fast.objectives.rows import PairRow
from vjepa_fast.objectives.state import LatentState
from vjepa_fast.ops.latent import RowCall, RowFunction


def _delta(z0: Tensor, z1: Tensor, h0: Tensor, h1: Tensor, p: float) -> PairRow:
    d = (z1 - z0) - (h1 - h0)
    return d.abs(), -d.sign(), d.sign()


def _delta_device() -> Any:
    import triton
    import triton.language as tl

    @triton.jit
    def delta(z0: tl.tensor, z1: tl.tensor, h0: tl.tensor, h1: tl.tensor, p: tl.tensor) -> tuple[tl.tensor, ...]:
        d = (z1 - z0) - (h1 - h0)
        s = tl.where(d > 0, 1.0, tl.where(d < 0, -1.0, 0.0))
        return tl.abs(d), -s, s

    return delta


DELTA = RowFunction("delta", "PAIR", _delta, _delta_device, cpp=1)


@objective("delta")
@dataclass(frozen=True)
class Delta(Objective):
    """mean over pairs of abs((z(t+1) - z(t)) - (h(t+1) - h(t)))."""

    access = "PAIR"
    needs = frozenset({"z", "h", "masks_enc", "grids"})
    gradient_to = "z"
    published = {"coeff": "optimization.delta_coeff"}

    def lower(self, ctx: TermContext) -> tuple[RowCall, ...]:
        return (DELTA(),)

    def value(self, state: LatentState, head: nn.Module | None, ctx: TermContext) -> Tensor:
        entries = [view.mean(view.rows(*self.lower(ctx))) for view in state.temporal()]
        return mean_of_entries(entries, state.outputs("z"))
