"""pred by hand."""

import pytest

from tests.objectives.tiny import tiny_state, value_of

H = [[1, 2], [3, 4], [5, 6], [7, 8]]


@pytest.mark.parametrize(("loss_exp", "want"), [(1.0, (1 + 0 + 2 + 3) / 4), (2.0, (1 + 0 + 4 + 9) / 4 / 2)])
def test_by_hand(loss_exp, want):
    state = tiny_state((2, 1, 2), h=H, z_pred=[[4, 4], [5, 5]], pred=[1, 3])  # differences (1, 0) and (-2, -3)
    value, _, out = value_of("pred", {"loss_exp": loss_exp}, state)
    assert value == want
    out.total.backward()
    grad = state.z_pred[0][0].grad[0]
    assert grad.tolist() == [[0.25, 0], [-0.25 * 2 ** (loss_exp - 1), -0.25 * 3 ** (loss_exp - 1)]]


def test_mean_over_masks_not_over_tokens():
    state = tiny_state((2, 1, 2), h=H, z_pred=[[3, 6]], pred=[1])  # mean error 1
    more = tiny_state((2, 1, 2), h=H, z_pred=[[1, 2], [3, 4], [5, 10]], pred=[0, 1, 2])  # mean error 4/6
    state.z_pred[0] += more.z_pred[0]
    state.masks_pred[0] += more.masks_pred[0]
    assert value_of("pred", {}, state)[0] == pytest.approx((1 + 4 / 6) / 2)
