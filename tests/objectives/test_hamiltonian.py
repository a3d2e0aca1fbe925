"""hamiltonian against a network whose gradient is known, and against autograd."""

import math

import pytest
import torch

from tests.objectives.tiny import tiny_state, value_of
from vjepa_fast.objectives.api import head_generator
from vjepa_fast.objectives.terms.hamiltonian import HamiltonianNet, gelu_slope


def test_gelu_slope():
    x = torch.linspace(-6, 6, 101, dtype=torch.float64, requires_grad=True)
    (want,) = torch.autograd.grad(torch.nn.functional.gelu(x).sum(), x)
    torch.testing.assert_close(gelu_slope(x), want, rtol=1e-12, atol=1e-14)


def test_one_step_agrees_with_autograd():
    net = HamiltonianNet(6, 5, head_generator(0, "h")).double()
    g = torch.Generator().manual_seed(1)
    q, p = (torch.randn(4, 3, generator=g, dtype=torch.float64) for _ in range(2))

    def slope(q, p, of):
        parts = {"q": q.clone().requires_grad_(), "p": p.clone().requires_grad_()}
        return torch.autograd.grad(net(torch.cat([parts["q"], parts["p"]], -1)).sum(), parts[of])[0]

    q_next = q + 0.1 * slope(q, p, "p")
    p_next = p - 0.1 * slope(q_next, p, "q")
    got = net.symplectic_euler(q, p, 0.1)
    torch.testing.assert_close(got[0], q_next, rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(got[1], p_next, rtol=1e-12, atol=1e-13)


def linear_energy(a, b):
    """A head with H(q, p) = a q + b p: two GELU layers of x and -x are the identity."""
    pairs = torch.tensor([[1.0, -1.0]])
    return {
        "net.0.weight": pairs.T * torch.tensor([[a, b]]),
        "net.0.bias": torch.zeros(2),
        "net.2.weight": pairs.T @ pairs,
        "net.2.bias": torch.zeros(2),
        "net.4.weight": pairs,
        "net.4.bias": torch.tensor([3.0]),
    }


@pytest.mark.parametrize("loss_exp", [1, 2])
def test_a_linear_energy_moves_at_constant_speed(loss_exp):
    # grid 2 x 1 x 2, place 0 is the only pair: q' = 5 + 0.5 * 3 = 6.5, p' = 1 - 0.5 * 2 = 0
    state = tiny_state((2, 1, 2), z=[[5, 1], [9, 9], [9, 9]], h=[[0, 0], [0, 0], [7, 2], [0, 0]], enc=[0, 1, 2])
    fields = {"dt": 0.5, "hidden_dim": 2, "loss_exp": loss_exp}
    value, plan, out = value_of("hamiltonian", fields, state, heads=linear_energy(2.0, 3.0))
    want = 0.5**loss_exp / loss_exp + 2**loss_exp / loss_exp
    assert value == pytest.approx(want, rel=1e-12)
    out.total.backward()
    grads = {k: w.grad for k, w in plan.heads["hamiltonian"].named_parameters()}
    assert grads.pop("net.4.bias") is None
    assert all(g is not None and g.isfinite().all() for g in grads.values())
    q_grad = state.z[0][0].grad[0, 0, 0].item()
    assert math.copysign(1, q_grad) == -1 and not state.z[0][0].grad[0, 1:].any()
