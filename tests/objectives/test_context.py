"""context by hand: plain and weighted by distance."""

import pytest

from tests.objectives.tiny import tiny_state, value_of

NOW = {"warmup": [0, 0]}
# grid 2 x 1 x 5: tokens 0..4 at t=0, 5..9 at t=1
H = [[0, 0]] * 10


def state():
    return tiny_state((2, 1, 5), h=H, z_context=[[1, 3], [0, 2]], enc=[0, 8], pred=[4, 6])


def test_without_distance():
    assert value_of("context", NOW, state())[0] == (1 + 3 + 0 + 2) / 4
    assert value_of("context", {**NOW, "loss_exp": 2}, state())[0] == (1 + 9 + 0 + 4) / 4 / 2


def test_weight_is_one_over_the_root_of_the_distance():
    # token 0 at (0,0,0): nearest predicted is 6 at (1,0,1), sqrt(2) away; token 8 at (1,0,3): 4 at (0,0,4), sqrt(2) too
    weight = 2 ** (-1 / 4)
    value, _, out = value_of("context", {**NOW, "weight_distance": True}, state())
    assert value == pytest.approx(weight * 6 / 4, rel=1e-7)
    assert out.total.item() == value


def test_offset_divides_the_distance_on_large_grids():
    def far(offset):
        s = tiny_state((1, 1, 32), h=[[0, 0]] * 32, z_context=[[1, 1]], enc=[0], pred=[18])
        return value_of("context", {**NOW, "weight_distance": True, "offset": offset}, s)[0]

    assert far(False) == pytest.approx(18**-0.5, rel=1e-6)
    assert far(True) == pytest.approx(9**-0.5, rel=1e-6)


def test_offset_changes_nothing_on_small_grids():
    plain, offset = (
        value_of("context", {**NOW, "weight_distance": True, "offset": flag}, state())[0] for flag in (False, True)
    )
    assert plain == offset
