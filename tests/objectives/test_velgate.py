"""velgate by hand."""

import pytest

from tests.objectives.tiny import tiny_state, value_of

# grid 2 x 1 x 3; target speeds 5, 1, 3 at the three places
H = [[0, 0], [0, 0], [0, 0], [3, 4], [1, 0], [0, 3]]
Z = [[1, 1], [2, 2], [3, 3], [11, 1], [2, 6], [3, 5]]  # steps (10, 0), (0, 4), (0, 2)


@pytest.mark.parametrize(
    ("percentile", "open_places"),
    [(0.5, (1, 2)), (0.0, (1,)), (1.0, (0, 1, 2)), (0.4, (1,)), (0.6, (1, 2))],  # median speed 3; linear between ranks
)
def test_by_hand(percentile, open_places):
    state = tiny_state((2, 1, 3), z=Z, h=H, enc=list(range(6)))
    value, _, out = value_of("velgate", {"percentile": percentile}, state)
    steps = [10, 4, 2]
    assert value == pytest.approx(sum(steps[p] for p in open_places) / 6)  # closed pairs count as zeros
    out.total.backward()
    moved = {k % 3 for k, row in enumerate(state.z[0][0].grad[0]) if row.any()}
    assert moved == set(open_places)


def test_the_threshold_is_that_of_the_whole_grid():
    # only place 0 makes a pair; it is the fastest of three, so it is closed although it is alone
    state = tiny_state((2, 1, 3), z=[Z[0], Z[3]], h=H, enc=[0, 3])
    assert value_of("velgate", {}, state)[0] == 0
