"""The loss of LeVJEPA against the same formulas written plainly, in float64."""

import math

import pytest
import torch

from vjepa_fast.objectives import levjepa
from vjepa_fast.objectives.epps_pulley import draw

VIEWS, CLIPS, CHANNELS, SLICES = 3, 6, 5, 4


def embeddings(seed=0, clips=CLIPS):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(VIEWS, clips, CHANNELS, generator=g, dtype=torch.float64) * 1.4 + 0.3


def normal():
    return draw(CHANNELS, SLICES, seed=3, step=7, device=torch.device("cpu")).double()


def plain_sigreg(e, normal, knots=17):
    """Loop over views, directions and knots; the trapezoid rule from -3 to 3 by symmetry, twice that from 0 to 3."""
    total, dt = 0.0, 3 / (knots - 1)
    for view in e:
        for column in normal.T:
            u, statistic = view @ (column / column.norm()), 0.0
            for k in range(knots):
                t = k * dt
                target = math.exp(-t * t / 2)
                gap = ((t * u).cos().mean() - target) ** 2 + (t * u).sin().mean() ** 2
                statistic = statistic + (dt if k in (0, knots - 1) else 2 * dt) * target * gap
            total = total + len(view) * statistic
    return total / (len(e) * normal.shape[1])


def test_invariance_is_the_mean_over_views_clips_and_channels_and_reaches_the_global_view():
    e = embeddings().requires_grad_()
    found = levjepa.invariance(e)
    want = sum((e[0, b, c] - e[v, b, c]) ** 2 for v in range(VIEWS) for b in range(CLIPS) for c in range(CHANNELS))
    torch.testing.assert_close(found, want / e.numel(), rtol=1e-12, atol=0)
    (grad,) = torch.autograd.grad(found, e)
    torch.testing.assert_close(grad[0], -grad[1:].sum(0), rtol=1e-12, atol=1e-15)  # no stop-gradient
    assert grad[0].abs().min() > 0
    assert levjepa.invariance(e[:1].expand(VIEWS, -1, -1)) == 0


@pytest.mark.parametrize("knots", [17, 5])
def test_sigreg_is_the_plain_sum_per_view_times_the_clips(knots):
    e = embeddings().requires_grad_()
    found, want = levjepa.sigreg(e, normal(), knots), plain_sigreg(e, normal(), knots)
    torch.testing.assert_close(found, want, rtol=1e-6, atol=0)  # the product of ops.matmul32
    grads = [torch.autograd.grad(loss, e)[0] for loss in (found, want)]
    torch.testing.assert_close(*grads, rtol=1e-5, atol=1e-8)


class Half:
    """Two processes, of which this one knows what the other's means are."""

    world = 2

    def __init__(self, other):
        self.other = other

    def mean(self, values):
        return (values + self.other) / 2


def test_sigreg_of_two_processes_is_that_of_all_their_clips():
    """And the mean of their gradients, which data-parallel training takes, is its gradient."""
    whole = embeddings(1, 2 * CLIPS).requires_grad_()
    want = levjepa.sigreg(whole, normal())
    (exact,) = torch.autograd.grad(want, whole)
    halves = [part.detach().requires_grad_() for part in whole.split(CLIPS, 1)]

    seen = []

    class Listening(Half):
        def mean(self, values):
            seen.append(values)
            return values

    for half in halves:
        levjepa.sigreg(half, normal(), together=Listening(None))
    for part, half, other in zip(exact.split(CLIPS, 1), halves, reversed(seen)):
        found = levjepa.sigreg(half, normal(), together=Half(other))
        torch.testing.assert_close(found, want, rtol=1e-6, atol=0)
        (grad,) = torch.autograd.grad(found, half)
        torch.testing.assert_close(grad / 2, part, rtol=1e-5, atol=1e-8)


def test_sigreg_tells_collapse_and_disagreement_of_scale_from_a_gaussian():
    g = torch.Generator().manual_seed(0)
    gauss, directions = torch.randn(1, 500, CHANNELS, generator=g), normal().float()
    low = levjepa.sigreg(gauss, directions)
    assert low < 3
    for bad in (gauss * 0, gauss * 3, gauss + 1, gauss[..., :1].expand_as(gauss)):
        assert levjepa.sigreg(bad, directions) > 5 * low
