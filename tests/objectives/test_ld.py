"""ld by hand: an identity head, so that the prediction is z itself."""

import math

import pytest
import torch

from tests.objectives.tiny import identity_head, tiny_state, value_of

# grid 3 x 1 x 2; place 0 at t=0,1,2 (pairs 0->2, 2->4), place 1 at t=0 only
ENC = [0, 1, 2, 4]
H = [[0, 0], [7, 7], [1, 3], [8, 8], [1, 4], [9, 9]]
Z = [[2, 2], [50, 50], [1, 6], [50, 50]]  # h steps (1, 3) and (0, 1): errors (1, -1) and (1, 5)


def ld(fields, **options):
    state = tiny_state((3, 1, 2), z=Z, h=H, enc=ENC)
    value, plan, out = value_of("ld", {"hidden_dim": 4, **fields}, state, heads=identity_head(2), **options)
    return value, state, plan, out


def test_by_hand():
    value, state, plan, out = ld({})
    assert value == pytest.approx((1 + 1 + 1 + 5) / 4)
    out.total.backward()
    want = torch.tensor([[0.25, -0.25], [0, 0], [0.25, 0.25], [0, 0]], dtype=torch.float64)
    torch.testing.assert_close(state.z[0][0].grad[0], want)
    assert plan.heads["ld"][2].bias.grad.tolist() == [0.5, 0.0]


@pytest.mark.parametrize("compat", ["intended", "published"])
def test_hard_weighting_over_the_pairs_of_the_batch(compat):
    value, state, _, out = ld({"hard_weighting": 2.0}, compat=compat)  # pair errors 1 and 3
    share = 1 / (1 + math.exp(-(3 - 1) / 2.0))
    assert value == pytest.approx(share * 3 + (1 - share) * 1, rel=1e-12)
    if compat == "published":
        assert not out.total.requires_grad
    else:
        out.total.backward()
        assert state.z[0][0].grad[0, 2].tolist() == pytest.approx([share / 2, share / 2])  # weights are constants


def two_samples():
    first, second = (tiny_state((3, 1, 2), z=z, h=H, enc=ENC) for z in (Z, [[1, 12], [0, 0], [0, 2], [0, 0]]))
    for name in ("z", "masks_enc"):
        setattr(first, name, [[torch.cat([getattr(s, name)[0][0] for s in (first, second)])]])
    first.h = [torch.cat([first.h[0], second.h[0]])]
    return first


def test_hard_scope():
    head = identity_head(2)
    errors = torch.tensor([[1.0, 3.0], [4.5, 0.5]], dtype=torch.float64)  # per sample, per pair
    batch = 4 * errors.flatten().softmax(0) * errors.flatten()
    sample = 2 * errors.softmax(1) * errors
    for scope, want in (("batch", batch.mean()), ("sample", sample.mean())):
        fields = {"hidden_dim": 4, "hard_weighting": 1.0, "hard_scope": scope}
        assert value_of("ld", fields, two_samples(), heads=head)[0] == pytest.approx(want.item(), rel=1e-12)


def test_hard_scope_sample_with_a_sample_without_pairs():
    state = two_samples()
    state.masks_enc[0][0][1] = torch.tensor([0, 1, 4, 5])  # t = 0 and t = 2: no pair
    fields = {"hidden_dim": 4, "hard_weighting": 1.0, "hard_scope": "sample"}
    value, _, out = value_of("ld", fields, state, heads=identity_head(2))
    errors = torch.tensor([1.0, 3.0], dtype=torch.float64)
    assert value == pytest.approx((errors.softmax(0) * errors).sum().item(), rel=1e-12)
    (grad,) = torch.autograd.grad(out.total, state.z[0][0])
    assert grad[0].any() and not grad[1].any()


def test_dynamics_channels_feed_the_head():
    head = {"0.weight": [[1.0]], "0.bias": [0.0], "2.weight": [[0.0], [0.0]], "2.bias": [0.0, 0.0]}
    state = tiny_state((3, 1, 2), z=Z, h=H, enc=ENC)
    value, plan, out = value_of("ld", {"hidden_dim": 1, "channels": "dynamics"}, state, heads=head)
    assert value == (1 + 3 + 0 + 1) / 4  # the head says 0
    with torch.no_grad():
        plan.heads["ld"][2].weight.fill_(3.0)
    plan(state).total.backward()
    grad = state.z[0][0].grad[0]
    assert not grad[:, 0].any() and grad[[0, 2], 1].all()
