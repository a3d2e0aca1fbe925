"""Hamiltonian dynamics: features evolve by a learned energy (arXiv:2605.17165).

    z(t) = (q, p), its two halves;  q' = q + dt dH/dp(q, p);  p' = p - dt dH/dq(q', p)   (symplectic Euler)
    mean over pairs of abs(q' - h_q(t+1))^e / e  +  the same of p' and h_p.  h is detached.

H is a three-layer MLP with exact GELU. Its input gradient is written out instead of asking autograd for it, so the
term needs no second derivative and works under no_grad. The last bias never enters, hence gets no gradient.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vjepa_fast import ops
from vjepa_fast.errors import ConfigError
from vjepa_fast.objectives.api import Objective, TermContext, linear, number, objective
from vjepa_fast.objectives.reduce import Entry, mean_of_entries
from vjepa_fast.objectives.rows import power_error
from vjepa_fast.objectives.state import LatentState
from vjepa_fast.ops.latent import RowCall


class HamiltonianNet(nn.Module):
    """H(q, p), a scalar per row; parameters ``net.0 net.2 net.4``."""

    def __init__(self, dim: int, hidden: int, generator: torch.Generator):
        super().__init__()
        self.net = nn.Sequential(
            linear(dim, hidden, generator),
            nn.GELU(),
            linear(hidden, hidden, generator),
            nn.GELU(),
            linear(hidden, 1, generator),
        )

    def forward(self, x: Tensor) -> Tensor:
        """Energy [..., 1] of states ``x`` [..., D]."""
        return self.net(x)

    def slope(self, x: Tensor) -> Tensor:
        """d(energy)/d(first layer's output), [..., hidden]; times the first weight it is dH/dx."""
        first, second, last = self._layers()
        a = first(x)
        b = second(F.gelu(a))
        back = gelu_slope(b) * last.weight[0]
        return gelu_slope(a) * ops.matmul32(back, second.weight)

    def _layers(self) -> list[nn.Linear]:
        return [layer for layer in self.net if isinstance(layer, nn.Linear)]

    def symplectic_euler(self, q: Tensor, p: Tensor, dt: float) -> tuple[Tensor, Tensor]:
        """One step of size ``dt`` from (q, p), each [..., D/2]."""
        half = q.shape[-1]
        weight_q, weight_p = self._layers()[0].weight.tensor_split((half,), dim=1)
        q_next = q + dt * ops.matmul32(self.slope(torch.cat([q, p], -1)), weight_p)
        p_next = p - dt * ops.matmul32(self.slope(torch.cat([q_next, p], -1)), weight_q)
        return q_next, p_next


def gelu_slope(x: Tensor) -> Tensor:
    """Derivative of the exact GELU: Phi(x) + x phi(x)."""
    return 0.5 * (1 + torch.erf(x * math.sqrt(0.5))) + x * torch.exp(-0.5 * x * x) / math.sqrt(2 * math.pi)


@objective("hamiltonian")
@dataclass(frozen=True)
class Hamiltonian(Objective):
    """(q, p) = halves of z(t), one symplectic Euler step of a learned energy; mean abs(q' - h_q(t+1))^e/e + the same of
    p, with e = `loss_exp`.
    """

    access = "PAIR"
    needs = frozenset({"z", "h", "masks_enc", "grids"})
    gradient_to = "z, head (not its last bias)"
    published = {
        "coeff": "optimization.hamiltonian_coeff",
        "dt": "optimization.hamiltonian_dt",
        "hidden_dim": "optimization.hamiltonian_hidden_dim",
        "loss_exp": "loss.loss_exp",
    }

    dt: float = number(0.1, above=0.0)
    hidden_dim: int = number(256, low=1, most=1_000_000)
    loss_exp: float = number(1.0, low=1.0)

    def build_head(self, ctx: TermContext, generator: torch.Generator) -> nn.Module:
        if ctx.dim % 2:
            raise ConfigError(f"objectives.hamiltonian: levels x embed_dim is {ctx.dim}; an even number is needed")
        return HamiltonianNet(ctx.dim, self.hidden_dim, generator)

    def lower(self, ctx: TermContext) -> tuple[RowCall, ...]:
        return (power_error(self.loss_exp),)

    def value(self, state: LatentState, head: nn.Module | None, ctx: TermContext) -> Tensor:
        assert isinstance(head, HamiltonianNet)
        entries: list[Entry] = []
        for view in state.temporal():
            q, p = view.z.chunk(2, dim=-1)
            guess_BKD = torch.cat(head.symplectic_euler(q, p, self.dt), -1)
            rows_BK = view.target_rows(guess_BKD, *self.lower(ctx), target="next")
            entries.append(view.mean(2 * rows_BK))  # a mean over all channels is half the sum of those of q and p
        used = [w for name, w in head.named_parameters() if name != "net.4.bias"]
        return mean_of_entries(entries, [*state.outputs("z"), *used])
