"""hw by hand."""

import math

import pytest
import torch

from tests.objectives.tiny import tiny_state, value_of

H = [[0, 0]] * 4


@pytest.mark.parametrize("temp", [1.0, 0.5])
def test_by_hand(temp):
    state = tiny_state((2, 1, 2), h=H, z_pred=[[1, 3], [1, 1]], pred=[0, 2])  # token errors 2 and 1
    value, _, out = value_of("hw", {"temp": temp}, state)
    share = 1 / (1 + math.exp(-1 / temp))  # softmax of the first
    assert value == pytest.approx(share * 2 + (1 - share) * 1, rel=1e-14)
    out.total.backward()
    want = [[share / 2, share / 2], [(1 - share) / 2, (1 - share) / 2]]  # as if the weights were constants
    torch.testing.assert_close(state.z_pred[0][0].grad[0], torch.tensor(want, dtype=torch.float64))


def test_temperature_zero_is_the_hardest_token():
    state = tiny_state((2, 1, 2), h=H, z_pred=[[1, 3], [1, 1]], pred=[0, 2])
    assert value_of("hw", {"temp": 0}, state)[0] == 2


def test_equal_errors_give_the_plain_mean():
    state = tiny_state((2, 1, 2), h=H, z_pred=[[1, 3], [-2, 2]], pred=[0, 2])
    assert value_of("hw", {}, state)[0] == 2
    assert value_of("hw", {"loss_exp": 2}, state)[0] == pytest.approx(
        (2.5 * math.exp(0.5) + 2.0) / (math.exp(0.5) + 1)  # squared errors 5/2 and 4/2
    )


def test_softmax_is_per_sample():
    one = tiny_state((2, 1, 2), h=H, z_pred=[[1, 3], [1, 1]], pred=[0, 2])
    two = tiny_state((2, 1, 2), h=H, z_pred=[[9, 9], [0, 0]], pred=[0, 2])
    both = tiny_state((2, 1, 2), h=H, z_pred=[[1, 3], [1, 1]], pred=[0, 2])
    for name in ("z_pred", "masks_pred"):
        setattr(both, name, [[torch.cat([getattr(one, name)[0][0], getattr(two, name)[0][0]])]])
    both.h = [torch.cat([one.h[0], two.h[0]])]
    want = (value_of("hw", {}, one)[0] + value_of("hw", {}, two)[0]) / 2
    assert value_of("hw", {}, both)[0] == pytest.approx(want, rel=1e-14)
