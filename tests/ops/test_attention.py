"""Attention of packed qkv in C++ against softmax written out in float64, positions by rope3d."""

import pytest
import torch

from vjepa_fast import ops
from vjepa_fast.ops import _cpp
from vjepa_fast.ops.attention import attention, attention_backward

pytestmark = pytest.mark.skipif(not _cpp.LOADED, reason=_cpp.REASON or "-")


def some(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def by_hand(qkv, table, lengths, heads):
    if table is not None:
        qkv = ops.rope3d(qkv, table, heads)
    outs = []
    for part in qkv.split(lengths, 1):
        q, k, v = part.unflatten(-1, (3, heads, -1)).permute(2, 0, 3, 1, 4)
        weights = (q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5).softmax(-1)
        outs.append((weights @ v).transpose(1, 2).flatten(2))
    return torch.cat(outs, 1)


def angles(*shape, seed=5):
    x = some(*shape, seed=seed)
    return torch.stack((x.cos(), x.sin()), -2)


# heads and segments that fill no tile, and segments longer than a block of query rows
@pytest.mark.parametrize(("heads", "d", "rotated"), [(4, 12, 12), (3, 32, 30), (1, 2, 2), (2, 33, None)])
@pytest.mark.parametrize("lengths", [(23,), (10, 13), (1, 100, 70), (0, 5)])
@pytest.mark.parametrize("own", [False, True])
def test_values_and_gradients(heads, d, rotated, lengths, own):
    b, k = 2, sum(lengths)
    qkv, grad = some(b, k, 3 * heads * d), some(b, k, heads * d, seed=1)
    table = None if rotated is None else angles(*((b,) if own else ()), k, rotated)
    x = qkv.double().requires_grad_()
    with ops.use_backend("eager"):
        want = by_hand(x, table, lengths, heads)
        (wanted,) = torch.autograd.grad(want, x, grad.double())
    out, lse = attention(qkv, table, lengths, heads)
    assert lse.shape == (b, heads, k)
    torch.testing.assert_close(out.double(), want, rtol=1e-4, atol=1e-5)
    dqkv = attention_backward(grad, qkv, table, lengths, heads, out, lse)
    torch.testing.assert_close(dqkv.double(), wanted, rtol=1e-4, atol=2e-5)


def test_the_same_bits_on_any_number_of_threads():
    qkv, grad, lengths = some(2, 90, 144), some(2, 90, 48, seed=1), (40, 50)
    kept, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            out, lse = attention(qkv, None, lengths, 4)
            found.append((out, lse, attention_backward(grad, qkv, None, lengths, 4, out, lse)))
    finally:
        torch.set_num_threads(kept)
    assert all(torch.equal(a, b) for other in found[1:] for a, b in zip(found[0], other))


@pytest.mark.parametrize("lengths", [(10, 12), (24,), (-1, 24)])
def test_lengths_must_add_up(lengths):
    with pytest.raises(RuntimeError, match="length"):
        attention(some(1, 23, 36), None, lengths, 2)


def test_other_shapes_are_refused():
    qkv = some(1, 6, 36)
    for wrong, table in ((qkv[..., :35], None), (qkv[:, ::2], None), (qkv, angles(5, 4)), (qkv, angles(6, 8))):
        with pytest.raises(RuntimeError, match="attention"):
            attention(wrong, table, (wrong.shape[1],), 2)


def test_attention_keeps_a_nan():
    """Of a key it reaches every token of its segment and head, and no other."""
    qkv = torch.randn(1, 50, 3 * 32)
    qkv[0, 7, 32] = float("nan")  # key, first of two heads
    out, _ = attention(qkv, None, (20, 30), 2)
    lost = torch.isnan(out)
    assert lost[0, :20, :16].all() and lost.sum() == 20 * 16


def test_attention_of_hopeless_scores():
    """Scores that are all -inf have no softmax: NaN, as in PyTorch, and not the mean of the padding."""
    qkv = torch.ones(1, 5, 3 * 4)
    qkv[0, :, :4], qkv[0, :, 4:8] = 1e30, -1e30
    out, _ = attention(qkv, None, (5,), 1)
    assert out.isnan().all()


def test_an_odd_head_reads_no_neighbour():
    qkv = torch.randn(1, 6, 3 * 6)  # two heads of 3 channels
    qkv[0, :, 3:6] = float("nan")  # queries of the second
    out, _ = attention(qkv, None, (6,), 2)
    assert out[..., :3].isfinite().all() and out[..., 3:].isnan().all()
