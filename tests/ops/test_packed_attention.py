"""packed_attention: softmax written out, and the kernels against eager code in float64; segments, filler, positions."""

import importlib.util

import pytest
import torch

from tests.ops.parity import BACKENDS, KERNELS, assert_parity, device_for
from vjepa_fast import ops
from vjepa_fast.ops.packed_attention import _packed_attention, _packed_attention_backward

TRITON = KERNELS[1:]
pytestmark = pytest.mark.filterwarnings(
    "ignore:(overflow|invalid value|divide by zero) encountered"
)  # by the interpreter
needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def any_table(*shape, seed=5):
    """Angles that differ within a pair, as in variant v2, so that the map is no rotation and its transpose differs."""
    angles = random(*shape, seed=seed)
    return torch.stack((angles.cos(), angles.sin()), -2)


def attend(table, offsets, heads):
    def run(qkv):
        on = None if table is None else table.to(qkv.device)
        return ops.packed_attention(qkv, on, torch.tensor(offsets, dtype=torch.int32, device=qkv.device), heads)

    return run


def by_hand(qkv, table, offsets, heads):
    """Softmax of each segment, rows behind the last one zeros."""
    b, k, _ = qkv.shape
    qkv = qkv if table is None else ops.rope3d(qkv, table, heads)
    outs = []
    for part in qkv.flatten(0, 1).split([b - a for a, b in zip(offsets, offsets[1:])] + [b * k - offsets[-1]]):
        q, key, v = part.unflatten(-1, (3, heads, -1)).permute(1, 2, 0, 3)
        outs.append(((q @ key.mT / q.shape[-1] ** 0.5).softmax(-1) @ v).transpose(0, 1).flatten(1))
    outs[-1] = outs[-1] * 0
    return torch.cat(outs).view(b, k, -1)


@pytest.mark.parametrize("own", [False, True])
@pytest.mark.parametrize("offsets", [(0, 12), (0, 5, 5, 9), (0, 0, 1, 12)])
def test_eager_code_is_the_formula(offsets, own):
    qkv, table = random(2, 6, 3 * 2 * 8).double().requires_grad_(), any_table(*((2,) if own else ()), 6, 6)
    with ops.use_backend("eager"):
        out, want = attend(table, offsets, 2)(qkv), by_hand(qkv, table, offsets, 2)
        torch.testing.assert_close(out, want, rtol=1e-10, atol=1e-12)
        g = random(2, 6, 16, seed=1).double()
        for a, b in zip(torch.autograd.grad(out, qkv, g), torch.autograd.grad(want, qkv, g)):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


# (b, k, heads, d, rotated, a table of each sample's own, offsets); tiles are 16 to 128 tokens
CASES = {
    "one_segment": (1, 40, 2, 16, 12, False, (0, 40)),
    "ragged_and_filler": (1, 75, 1, 24, 24, False, (0, 1, 1, 34, 68)),
    "no_positions": (2, 33, 1, 20, None, False, (0, 33, 66)),
    "nothing_to_turn": (1, 20, 1, 8, 0, False, (0, 0, 20)),
    "all_filler": (1, 20, 1, 8, 6, False, (0, 0)),
    "own_tables": (2, 20, 1, 64, 60, True, (0, 23, 26, 40)),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("backend", TRITON)
def test_values_and_gradients(backend, dtype, case):
    b, k, heads, d, r, own, offsets = CASES[case]
    table = None if r is None else any_table(*((b,) if own else ()), k, r)
    assert_parity(attend(table, offsets, heads), [random(b, k, 3 * heads * d)], backend=backend, dtype=dtype, wrt=(0,))


@pytest.mark.parametrize(("dtype", "d"), [(torch.bfloat16, 32), (torch.float16, 64), (torch.bfloat16, 88)])
@pytest.mark.parametrize("backend", TRITON)
def test_several_tiles_in_half_precision(backend, dtype, d):
    """The first of 140 tokens: two tiles of queries, two whole ones of keys and the rest of one."""
    qkv, table = random(1, 170, 3 * d), any_table(170, d - 4)
    assert_parity(attend(table, (0, 140, 165), 1), [qkv], backend=backend, dtype=dtype, wrt=(0,))


@pytest.mark.parametrize("backend", TRITON)
def test_a_segment_knows_nothing_of_its_stream(backend):
    """The same bits alone, beside others and before poisoned filler, whose own result and gradient are zeros."""
    offsets, table, device = (0, 9, 70, 100), any_table(130, 30).to(device_for(backend)), device_for(backend)
    qkv, grad = (random(1, 130, n, seed=n).bfloat16().to(device) for n in (3 * 32, 32))
    qkv[:, 100:], grad[:, 100:] = float("nan"), float("nan")

    def both(where, offsets):
        x = qkv[:, where].contiguous().requires_grad_()
        out = attend(table[where], offsets, 1)(x)
        return out.detach(), *torch.autograd.grad(out, x, grad[:, where])

    with ops.use_backend(backend):
        for n, whole in enumerate(both(slice(None), offsets)):
            assert not whole[:, 100:].any()
            for begin, end in zip(offsets, offsets[1:]):
                assert torch.equal(whole[:, begin:end], both(slice(begin, end), (0, end - begin))[n])


@needs_triton
@pytest.mark.skipif(torch.cuda.is_available(), reason="the interpreter's order of programs")
@pytest.mark.parametrize(("dtype", "d", "tokens"), [(torch.float32, 64, 40), (torch.bfloat16, 32, 140)])
def test_programs_in_the_opposite_order(dtype, d, tokens, monkeypatch):
    """None reads or writes what another has written, but between the passes."""
    from triton.runtime.interpreter import InterpreterBuilder

    x, table = random(1, tokens + 3, 3 * d).to(dtype).requires_grad_(), any_table(tokens + 3, d - 4)

    def both():
        out = attend(table, (0, tokens - 9, tokens), 1)(x)
        return out, *torch.autograd.grad(out.float().square().sum(), x)

    with ops.use_backend("triton"):
        want, place = both(), InterpreterBuilder.set_grid_idx
        monkeypatch.setattr(
            InterpreterBuilder, "set_grid_idx", lambda self, x, y, z: place(self, self.grid_dim[0] - 1 - x, y, z)
        )
        for a, b in zip(both(), want):
            assert torch.equal(a, b)


@pytest.mark.parametrize("backend", BACKENDS[:1] + TRITON)
def test_a_nan_reaches_its_segment_and_head_and_no_other(backend):
    """A key's, in whichever column of a tile: the last eighth have their exponentials from a polynomial."""
    device = device_for(backend)
    for row in (12, 70):
        qkv = random(1, 80, 3 * 64).bfloat16().to(device)
        qkv[0, row, 64] = float("nan")  # first of two heads
        with ops.use_backend(backend):
            lost = attend(None, (0, 10, 80), 2)(qkv).isnan()
        assert lost[0, 10:, :32].all() and lost.sum() == 70 * 32


@pytest.mark.parametrize("backend", TRITON)
def test_hopeless_scores_and_large_ones(backend):
    """All -inf have no softmax: NaN, as in PyTorch. A tile of them has no weight; far apart, one key has all of it."""
    device = device_for(backend)
    qkv = torch.ones(1, 40, 3 * 16)
    qkv[..., :16], qkv[..., 16:32] = 1e30, -1e30
    with ops.use_backend(backend):
        assert attend(None, (0, 40), 1)(qkv.to(device)).isnan().all()
        qkv[:, 35:, 16:32], qkv[:, 35:, 32:] = 0, 3
        out = attend(None, (0, 40), 1)(qkv.to(device))
        assert torch.equal(out.cpu(), torch.full((1, 40, 16), 3.0))
        qkv[..., :32], qkv[..., 32:] = 30 * random(1, 40, 32), 1
        out = attend(None, (0, 40), 1)(qkv.bfloat16().to(device))
        assert torch.equal(out.cpu(), torch.ones(1, 40, 16).bfloat16())


@pytest.mark.parametrize("backend", TRITON)
def test_scores_far_below_those_of_padding(backend):
    """Their sums are under 2^-128: what is padded to a tile, with scores of 0, would be infinite beside them."""
    qkv = torch.cat([6 + random(1, 40, 16) / 9, -6 + random(1, 40, 16, seed=1) / 9, random(1, 40, 16, seed=2)], -1)
    assert_parity(attend(None, (0, 40), 1), [qkv], backend=backend, wrt=(0,), atol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS[:1] + TRITON)
def test_nothing_to_do_and_strided_inputs(backend):
    device = device_for(backend)
    with ops.use_backend(backend):
        for b, k in ((0, 4), (2, 0)):
            x = torch.zeros(b, k, 48, device=device, requires_grad=True)
            out = attend(any_table(k, 4), (0, 0), 2)(x)
            assert out.shape == (b, k, 16) and torch.autograd.grad(out.sum(), x)[0].shape == x.shape
        x, table = random(12, 2, 49).to(device), any_table(6, 12).transpose(0, 1).contiguous().transpose(0, 1)[:, :, 4:]
        strided = x.transpose(0, 1)[:, ::2, 1:].requires_grad_()
        dense = strided.detach().contiguous().requires_grad_()
        outs = [attend(table, (0, 7, 12), 2)(v).transpose(0, 1) for v in (strided, dense)]
        g = random(6, 2, 16).to(device)
        assert torch.equal(*outs)
        assert torch.equal(*(torch.autograd.grad(out, v, g)[0] for out, v in zip(outs, (strided, dense))))


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"qkv": torch.zeros(2, 6, 50)}, r"qkv: expected a floating tensor \[B,K,3\*E\]"),
        ({"table": torch.zeros(5, 2, 6)}, r"table: expected float32 \[6,2,R\]"),
        ({"offsets": torch.tensor([0, 12])}, r"offsets: expected int32 \[S\+1\] on cpu, got int64 \[2\]"),
        ({"offsets": torch.zeros(0, dtype=torch.int32)}, "offsets: expected int32"),
        (
            {"offsets": torch.tensor([0, 13], dtype=torch.int32)},
            r"offsets: expected ascending .* B\*K=12, got \[0, 13\]",
        ),
        ({"offsets": torch.tensor([0, 5, 4], dtype=torch.int32)}, "offsets: expected ascending"),
        ({"offsets": torch.tensor([1, 5], dtype=torch.int32)}, "offsets: expected ascending from 0"),
    ],
)
def test_argument_errors(change, text):
    args = {"qkv": torch.zeros(2, 6, 48), "table": None, "offsets": torch.tensor([0, 12], dtype=torch.int32)} | change
    with pytest.raises(ValueError, match="packed_attention: " + text):
        ops.packed_attention(**args, num_heads=2)


@pytest.mark.parametrize(
    ("dtype", "d", "text"),
    [
        (torch.float64, 16, "triton computes in float32"),
        (torch.float32, 72, "at most 64 channels a head in torch.float32, not 72"),
        (torch.bfloat16, 136, "at most 128 channels a head in torch.bfloat16, not 136"),
    ],
)
@pytest.mark.parametrize("backend", TRITON)
def test_what_is_left_to_eager(backend, dtype, d, text):
    qkv = random(1, 3, 3 * d).to(device_for(backend), dtype)
    with ops.use_backend(backend), pytest.raises(ops.BackendError, match=text):
        attend(None, (0, 3), 1)(qkv)
    assert attend(None, (0, 3), 1)(qkv).dtype == dtype


def test_opcheck():
    table, offsets, x = any_table(5, 4), torch.tensor([0, 3, 8], dtype=torch.int32), random(2, 5, 48)
    with ops.use_backend("eager"):
        torch.library.opcheck(_packed_attention, (x.clone().requires_grad_(), table, offsets, 2))
        out, lse = _packed_attention(x, None, offsets, 2)
        torch.library.opcheck(_packed_attention_backward, (random(2, 5, 16), x, None, offsets, 2, out, lse))


@pytest.mark.parametrize("backend", TRITON)
def test_compiled_in_one_graph(backend):
    device = device_for(backend)
    table, offsets = any_table(5, 4).to(device), torch.tensor([0, 3, 8], dtype=torch.int32, device=device)
    x = random(2, 5, 48).to(device).requires_grad_()
    fn = lambda x: ops.packed_attention(x * 2, table, offsets, 2).sin().sum()  # noqa: E731
    with ops.use_backend(backend):
        for out, fake in zip(*(op(x.detach(), table, offsets, 2) for op in (_packed_attention, _faked))):
            assert (out.shape, out.dtype, out.stride()) == (fake.shape, fake.dtype, fake.stride())
        compiled = torch.compile(fn, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(*(torch.autograd.grad(f(x), x)[0] for f in (fn, compiled)))


def _faked(*args):
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode() as mode:
        return _packed_attention(*(mode.from_tensor(a) if isinstance(a, torch.Tensor) else a for a in args))


# -- exponentials ------------------------------------------------------------------------------------------------------
@needs_triton
@pytest.mark.parametrize("share", [0, 1, 2, 4])
def test_exponentials_by_polynomial(share):
    """Relative error 7.5e-5 of a share of the columns: under half a unit of float16, an eighth of one of bfloat16."""
    from tests.ops.exponentials import powers

    x = -torch.cat([torch.linspace(0, 126, 8 * 16 * 16 - 4), torch.tensor([1e-8, 200.0, 1e9, float("inf")])])
    x = x[torch.randperm(len(x), generator=torch.Generator().manual_seed(0))].view(-1, 16)
    found, want = powers(x, share).double(), torch.exp2(x.double())
    error = ((found - want).abs() / want.clamp(min=2.0**-126)).amax(0)
    polynomial = torch.arange(16) >= 16 - 2 * share
    assert (error[~polynomial] < 1e-6).all()
    assert ((error[polynomial] > 1e-6) & (error[polynomial] < 7.6e-5)).all()
    assert powers(torch.full((16, 16), float("nan")), share).isnan().all()
