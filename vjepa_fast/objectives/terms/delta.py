"""Delta prediction: context features should change over time as the target does (arXiv:2605.17165, Delta-JEPA).

mean over pairs and channels of abs((z(t+1) - z(t)) - (h(t+1) - h(t))), h detached
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from vjepa_fast.objectives.api import Objective, objective
from vjepa_fast.objectives.reduce import mean_of_entries
from vjepa_fast.ops.latent import RowFunction


def _delta(z0, z1, h0, h1, p):
    d = (z1 - z0) - (h1 - h0)
    return d.abs(), -d.sign(), d.sign()


def _delta_device():
    import triton
    import triton.language as tl

    @triton.jit
    def delta(z0, z1, h0, h1, p):
        d = (z1 - z0) - (h1 - h0)
        s = tl.where(d > 0, 1.0, tl.where(d < 0, -1.0, 0.0))
        return tl.abs(d), -s, s

    return delta


DELTA = RowFunction("delta", "PAIR", _delta, _delta_device, cpp=1)


@objective("delta")
@dataclass(frozen=True)
class Delta(Objective):
    access = "PAIR"
    needs = frozenset({"z", "h", "masks_enc", "grids"})
    gradient_to = "z"

    def lower(self, ctx):
        return (DELTA(),)

    def value(self, state, head, ctx) -> Tensor:
        entries = [view.mean(view.rows(*self.lower(ctx))) for view in state.temporal()]
        return mean_of_entries(entries, state.outputs("z"))
