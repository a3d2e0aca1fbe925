"""fwm_static by hand."""

import pytest

from tests.objectives.tiny import tiny_state, value_of

# grid 3 x 1 x 2; context: place 0 at t=0,1,2 and place 1 at t=0,2 (no pair)
ENC = [0, 1, 2, 4, 5]
Z = [[1, 10, 5, 0], [9, 9, 9, 9], [2, 30, 5, 0], [6, 30, 5, 0], [0, 0, 0, 0]]


def static(fields, levels=2, embed_dim=2):
    state = tiny_state((3, 1, 2), z=Z, enc=ENC)
    value, _, out = value_of("fwm_static", fields, state, levels=levels, embed_dim=embed_dim)
    return value, state, out


def test_by_hand():
    value, state, out = static({})  # channels 0, 1: steps (1, 20) and (4, 0)
    assert value == (1 + 20 + 4 + 0) / 4
    out.total.backward()
    assert state.z[0][0].grad[0].tolist() == [
        [-0.25, -0.25, 0, 0],
        [0, 0, 0, 0],
        [0, 0.25, 0, 0],
        [0.25, 0, 0, 0],
        [0, 0, 0, 0],
    ]


def test_ratio_and_split():
    assert static({"app_ratio": 0.25})[0] == (1 + 4) / 2
    assert static({"app_ratio": 0.01})[0] == (1 + 4) / 2  # at least one channel
    assert static({"app_ratio": 1.0})[0] == (1 + 20 + 4) / 8
    assert static({"split": "channel"})[0] == (1 + 4 + 0 + 0) / 4  # the first channel of each level


def test_normalize_undoes_a_shrunken_gain():
    value = static({"normalize": True}, levels=1, embed_dim=4)[0]
    small = tiny_state((3, 1, 2), z=[[x * 0.1 for x in row] for row in Z], enc=ENC)
    shrunk = value_of("fwm_static", {"normalize": True}, small, levels=1, embed_dim=4)[0]
    assert value > 0.1 and shrunk == pytest.approx(value, rel=1e-3)
    assert value_of("fwm_static", {}, small, levels=1, embed_dim=4)[0] == pytest.approx(0.1 * 25 / 4)
