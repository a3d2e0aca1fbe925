"""fwm_orth by hand and against numpy's covariance."""

import numpy as np
import pytest

from tests.objectives.tiny import random_state, tiny_state, value_of


def test_by_hand():
    # rows (1, 0), (3, 4), (5, 2): centred (-2, -2), (0, 2), (2, 0); covariance 4/2
    state = tiny_state((2, 1, 2), z=[[1, 0], [3, 4], [5, 2]], enc=[0, 1, 3])
    assert value_of("fwm_orth", {}, state)[0] == pytest.approx(4.0)


@pytest.mark.parametrize("split", ["depth", "channel"])
def test_is_the_mean_square_of_the_cross_covariance(split):
    state = random_state(grids=((3, 2, 2),), masks=1, levels=2, embed_dim=4)
    rows = state.z[0][0].detach().reshape(-1, 8).numpy()
    app = [0, 1, 4, 5] if split == "channel" else [0, 1, 2, 3]
    dyn = [c for c in range(8) if c not in app]
    want = (np.cov(rows.T)[np.ix_(app, dyn)] ** 2).mean()
    value = value_of("fwm_orth", {"split": split}, state, levels=2, embed_dim=4)[0]
    assert value == pytest.approx(want, rel=1e-12)


def test_one_row_and_images_are_left_out():
    one = tiny_state((2, 1, 2), z=[[1, 5]], enc=[0])
    image = tiny_state((1, 1, 3), z=[[1, 5], [2, 9], [0, 0]], enc=[0, 1, 2])
    assert value_of("fwm_orth", {}, one)[0] == 0
    assert value_of("fwm_orth", {}, image)[0] == 0


def test_normalize_ignores_the_scale():
    state = random_state(grids=((3, 2, 2),), masks=1)
    shrunk = random_state(grids=((3, 2, 2),), masks=1)
    shrunk.z = [[(0.5 * x).detach() for x in xs] for xs in shrunk.z]
    sizes = {"levels": 2, "embed_dim": 4}
    plain, normal = (
        [value_of("fwm_orth", {"normalize": flag}, s, **sizes)[0] for s in (state, shrunk)] for flag in (False, True)
    )
    assert plain[1] == pytest.approx(plain[0] / 16)
    assert normal[1] == pytest.approx(normal[0], rel=1e-3)
