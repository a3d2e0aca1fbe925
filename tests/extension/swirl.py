"""A term with a Triton kernel and keys of the published YAML, complete by registration alone."""

from dataclasses import dataclass

from vjepa_fast.objectives.api import Objective, number, objective
from vjepa_fast.objectives.reduce import mean_of_entries
from vjepa_fast.ops.latent import RowFunction


def _swirl(z0, z1, h0, h1, p):
    d = (z1 - z0) - p * (h1 - h0)
    return d * d, -2 * d, 2 * d


def _swirl_device():
    import triton

    @triton.jit
    def swirl(z0, z1, h0, h1, p):
        d = (z1 - z0) - p * (h1 - h0)
        return d * d, -2 * d, 2 * d

    return swirl


SWIRL = RowFunction("swirl", "PAIR", _swirl, _swirl_device)


@objective("swirl")
@dataclass(frozen=True)
class Swirl(Objective):
    access = "PAIR"
    needs = frozenset({"z", "h", "masks_enc", "grids"})
    gradient_to = "z"
    published = {"coeff": "optimization.swirl_coeff", "scale": "optimization.swirl_scale"}

    scale: float = number(1.0, above=0.0)

    def lower(self, ctx):
        return (SWIRL(self.scale),)

    def value(self, state, head, ctx):
        entries = [view.mean(view.rows(*self.lower(ctx))) for view in state.temporal()]
        return mean_of_entries(entries, state.outputs("z"))
