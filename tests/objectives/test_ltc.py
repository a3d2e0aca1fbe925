"""ltc by hand."""

import pytest

from tests.objectives.tiny import tiny_state, value_of

ENC = [0, 1, 2]  # grid 2 x 1 x 2: place 0 makes a pair, place 1 is seen at t=0 only
H = [[1, 0], [9, 9], [0, 2], [9, 9]]


@pytest.mark.parametrize(
    ("z", "margin", "want"),
    [
        ([3, 4], 0.5, 0.5 - 0.6 + 0.8),  # cosines 0.6 with h(t), 0.8 with h(t+1)
        ([3, 4], 0.0, 0.2),
        ([4, 3], 0.1, 0.0),  # already closer by more than the margin
    ],
)
def test_by_hand(z, margin, want):
    state = tiny_state((2, 1, 2), z=[z, [5, 5], [7, 7]], h=H, enc=ENC)
    value, _, out = value_of("ltc", {"margin": margin}, state)
    assert value == pytest.approx(want, abs=1e-12)
    out.total.backward()
    grad = state.z[0][0].grad[0]
    assert not grad[1:].any() and grad.isfinite().all()
    assert bool(grad[0].any()) == (want > 0)
