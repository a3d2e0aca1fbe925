"""delta by hand."""

from tests.objectives.tiny import tiny_state, value_of

# grid 3 x 1 x 2; place 0 at t=0,1,2 (two pairs), place 1 at t=0 and t=2 (none)
ENC = [0, 1, 2, 4, 5]
H = [[0, 0], [7, 7], [1, 2], [8, 8], [1, 4], [9, 9]]
Z = [[2, 2], [50, 50], [3, 6], [0, 6], [50, 50]]


def test_by_hand():
    state = tiny_state((3, 1, 2), z=Z, h=H, enc=ENC)
    value, _, out = value_of("delta", {}, state)  # z steps (1, 4), (-3, 0); h steps (1, 2), (0, 2)
    assert value == (0 + 2 + 3 + 2) / 4
    out.total.backward()
    assert state.z[0][0].grad[0].tolist() == [[0, -0.25], [0, 0], [0.25, 0.5], [-0.25, -0.25], [0, 0]]


def test_constant_offset_between_student_and_target_costs_nothing():
    state = tiny_state((3, 1, 2), z=[[x + 5 for x in H[t]] for t in ENC], h=H, enc=ENC)
    assert value_of("delta", {}, state)[0] == 0


def test_unsorted_masks_mean_the_same():
    order = [3, 0, 4, 2, 1]
    state = tiny_state((3, 1, 2), z=[Z[k] for k in order], h=H, enc=[ENC[k] for k in order])
    assert value_of("delta", {}, state)[0] == (0 + 2 + 3 + 2) / 4
