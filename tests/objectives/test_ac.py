"""ac by hand: the head says 0, so the value is the mean change of colour."""

import pytest
import torch

from tests.objectives.tiny import tiny_state, value_of

ZERO = {"0.weight": [[0.0, 0.0]], "0.bias": [0.0], "2.weight": [[0.0]] * 3, "2.bias": [0.0] * 3}
# grid 2 x 1 x 2, patch 2, tubelet 2: clip [3, 4, 2, 4]
COLOURS = torch.tensor([[[1.0, 7.0], [3.0, 7.5]], [[0.0, 5.0], [-4.0, 5.0]], [[2.0, 2.0], [2.0, 2.0]]])  # [C, T, W]


def clip():
    x = COLOURS.repeat_interleave(2, 1).repeat_interleave(2, 2).unsqueeze(2).repeat(1, 1, 2, 1)
    wave = torch.tensor([1.0, -1.0])
    return x + wave[None, None, None].repeat(1, 1, 1, 2)  # texture that a mean over the patch removes


def ac(enc, fields=None, heads=ZERO, **kwargs):
    state = tiny_state((2, 1, 2), z=[[1.0, 2.0]] * len(enc), enc=enc, clip=clip(), **kwargs)
    return value_of("ac", {"hidden_dim": 1, **(fields or {})}, state, heads=heads)


def test_by_hand():
    assert ac([0, 2])[0] == (2 + 4 + 0) / 3  # place 0: red +2, green -4, blue 0
    assert ac([0, 1, 2, 3])[0] == (2 + 4 + 0 + 0.5 + 0 + 0) / 6
    assert ac([0, 1, 3])[0] == 0.5 / 3


def test_the_head_predicts_the_signed_change():
    told = {**ZERO, "2.bias": [2.0, -4.0, 0.0]}
    assert ac([0, 2], heads=told)[0] == 0
    assert ac([0, 2], heads={**ZERO, "2.bias": [-2.0, 4.0, 0.0]})[0] == (4 + 8) / 3


def test_target_dim_keeps_the_first_colours():
    head = {**ZERO, "2.weight": [[0.0]], "2.bias": [0.0]}
    assert ac([0, 2], {"target_dim": 1}, heads=head)[0] == 2


def test_uint8_clips_are_normalised():
    stats = {"std": (0.5, 0.25, 1.0), "mean": (0.1, 0.2, 0.3)}
    state = tiny_state((2, 1, 2), z=[[1.0, 2.0]] * 2, enc=[0, 2], clip=clip(), **stats)
    state.clips = [(state.clips[0] * 10 + 100).to(torch.uint8)]  # steps +20, -40, 0
    want = (20 / 255 / 0.5 + 40 / 255 / 0.25) / 3
    assert value_of("ac", {"hidden_dim": 1}, state, heads=ZERO)[0] == pytest.approx(want, rel=1e-5)
