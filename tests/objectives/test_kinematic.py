"""kinematic by hand."""

import pytest
import torch

from tests.objectives.tiny import tiny_state, value_of

# grid 3 x 1 x 1
H = [[0.0, 1.0], [0.05, 3.0], [0.25, 2.0]]  # steps (0.05, 2), (0.2, -1); second difference (0.15, -3)


def huber(x):
    return 0.5 * x * x if abs(x) <= 0.1 else 0.1 * (abs(x) - 0.05)


@pytest.mark.parametrize(
    ("fields", "want"),
    [
        ({}, (0.05 + 2 + 0.2 + 1) / 4),
        ({"type": "acceleration"}, (0.15 + 3) / 2),
        ({"type": "huber"}, sum(map(huber, (0.05, 2, 0.2, -1))) / 4),
        ({"split_ratio": 0.5}, (0.05 + 0.2) / 2),
        ({"split_ratio": 0.5, "type": "acceleration"}, 0.15),
    ],
)
def test_by_hand(fields, want):
    state = tiny_state((3, 1, 1), h=H)
    state.h[0].requires_grad_()
    value, _, out = value_of("kinematic", fields, state, target_grad=True)
    assert value == pytest.approx(want, rel=1e-12)
    out.total.backward()
    assert state.h[0].grad.any()


def test_acceleration_of_two_steps_is_the_velocity():
    state = tiny_state((2, 1, 1), h=H[:2])
    assert value_of("kinematic", {"type": "acceleration"}, state, target_grad=True)[0] == pytest.approx(2.05 / 2)


def test_a_still_target_costs_nothing():
    state = tiny_state((3, 1, 2), h=[[1, 2], [3, 4]] * 3)
    for kind in ("l1", "acceleration", "huber"):
        assert value_of("kinematic", {"type": kind}, state, target_grad=True)[0] == 0


def test_ema_targets_get_nothing_as_published():
    state = tiny_state((3, 1, 1), h=H)
    value, _, out = value_of("kinematic", {}, state, compat="published")
    assert value > 0 and not out.total.requires_grad
    assert isinstance(out.total, torch.Tensor)
