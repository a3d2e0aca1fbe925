"""sigreg against numerical integration of the Epps-Pulley statistic."""

import dataclasses

import numpy as np
import pytest
import torch
from scipy import integrate

from tests.objectives.tiny import tiny_state, value_of
from vjepa_fast.objectives import LatentState, build_objectives
from vjepa_fast.objectives.terms import sigreg


def integrand(t, x):
    gap = abs(np.exp(1j * t * x).mean() - np.exp(-t * t / 2)) ** 2
    return gap * np.exp(-t * t / 2)


@pytest.mark.parametrize("shift", [0.0, 0.7, 2.0])
def test_against_numerical_integration(shift):
    x = np.random.default_rng(0).normal(shift, 1.3, 50)
    got = sigreg.epps_pulley(torch.tensor(x)[:, None]).item()
    t = np.linspace(-3, 3, 33)
    same_rule = len(x) * integrate.trapezoid([integrand(s, x) for s in t], t)
    assert got == pytest.approx(same_rule, rel=1e-12)
    exact = len(x) * integrate.quad(lambda s: integrand(s, x), -3, 3, epsabs=1e-12)[0]
    assert got == pytest.approx(exact, rel=0.02)


def test_one_dimension_needs_no_directions():
    # the directions are +1 or -1, and the statistic does not see the sign
    x = [[0.3], [-1.2], [2.0], [0.1], [-0.4]]
    want = sigreg.epps_pulley(torch.tensor(x, dtype=torch.float64)).item()
    state = tiny_state((1, 1, 5), z=x, enc=[0, 1, 2, 3, 4], step=11)
    assert value_of("sigreg", {}, state, embed_dim=1)[0] == pytest.approx(want, rel=1e-12)


def features(kind, rows=400, dim=8):
    g = torch.Generator().manual_seed(0)
    x = torch.randn(1, rows, dim, generator=g)
    if kind == "collapsed":
        x = x[:, :1].expand_as(x).contiguous()
    return LatentState(z=[[x[:, : rows // 2]], [x[:, rows // 2 :]]], step=3)


def plan(seed=0, slices=64, compat="intended"):
    return build_objectives({"sigreg": {"num_slices": slices}}, levels=1, embed_dim=8, seed=seed, compat=compat)


def test_gaussians_score_low_and_collapse_high():
    gauss, collapsed = (plan()(features(kind)).total.item() for kind in ("gauss", "collapsed"))
    assert gauss < 1.5 < 50 < collapsed


def test_all_masks_count_as_one_sample():
    state = features("gauss")
    joined = LatentState(z=[[torch.cat([state.z[0][0], state.z[1][0]], 1)]], step=3)
    assert plan()(joined).total.item() == plan()(state).total.item()


def test_directions_are_a_function_of_seed_and_step():
    state = features("gauss")
    first = plan()(state).total.item()
    assert plan()(state).total.item() == first
    assert plan(seed=1)(state).total.item() != first
    state.step = 4
    assert plan()(state).total.item() != first


class Counting:
    """SIGReg as LeJEPA's library computes it: a generator seeded with the number of calls, complex characteristic
    functions, the trapezoid rule."""

    def __init__(self, slices):
        self.slices, self.calls = slices, 0

    def __call__(self, x):
        generator = torch.Generator().manual_seed(self.calls)
        self.calls += 1
        a = torch.randn(x.shape[1], self.slices, generator=generator)
        u, t = x.double() @ (a / a.norm(dim=0)).double(), torch.linspace(-3, 3, 33, dtype=torch.float64)
        gap = torch.exp(1j * u[..., None] * t).mean(0) - torch.exp(-t * t / 2)
        return len(x) * torch.trapezoid(gap.abs() ** 2 * torch.exp(-t * t / 2), t).mean()


def test_published_directions_count_the_calls_whatever_the_seed():
    state, library = features("gauss"), Counting(64)
    rows = torch.cat([z[0][0] for z in state.z])
    for step in range(4):
        state.step = step
        want = library(rows).item()
        for seed in (0, 239):
            assert plan(seed, compat="published")(state).total.item() == pytest.approx(want, rel=1e-5)
    state.step = 2  # as a run goes on that was stopped before step 2
    resumed = plan(239, compat="published")(state).total.item()
    assert resumed == pytest.approx(_called(2)(rows).item(), rel=1e-5)
    assert plan(239)(state).total.item() != pytest.approx(resumed, rel=1e-3)


def _called(calls):
    library = Counting(64)
    library.calls = calls
    return library


def test_directions_drawn_ahead_are_used_as_they_are():
    """A captured step reads them from a buffer: their numbers, whatever the step that the state names."""
    state = features("gauss")
    want = plan()(state).total.item()
    drawn = plan().draw(state, torch.device("cpu"))
    assert torch.equal(drawn["sigreg"], torch.randn(8, 64, generator=torch.Generator().manual_seed(3)))
    assert plan()(dataclasses.replace(state, step=4, drawn=drawn)).total.item() == want
    torch.testing.assert_close(sigreg.directions(drawn["sigreg"]).norm(dim=0), torch.ones(64))


def test_recomputing_in_parts_changes_nothing(monkeypatch):
    def run():
        state = features("gauss")
        x = state.z[0][0].double().requires_grad_()
        state.z[0][0] = x
        out = plan(slices=50)(state)
        out.total.backward()
        return out.total.item(), x.grad

    whole, grad = run()
    monkeypatch.setattr(sigreg, "_CHUNK", 17 * 400 * 7)
    parts, grad_parts = run()
    assert parts == pytest.approx(whole, rel=1e-12)
    torch.testing.assert_close(grad_parts, grad)
