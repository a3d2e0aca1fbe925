"""rope3d: the formula written out channel by channel, and every backend against eager code in float64."""

import pytest
import torch

from tests.draws import given, settings, st
from tests.ops.parity import BACKENDS, KERNELS, assert_parity, device_for
from vjepa_fast import ops
from vjepa_fast.ops.rope import _rope3d, _rope3d_inplace, _rope3d_transpose

FLOATS = [torch.float32, torch.bfloat16]
B, K, HEADS, D, R = 2, 5, 2, 8, 6


def table_of(angles):
    return torch.stack((angles.cos(), angles.sin()), -2).float()


def angles_v21(*shape, r=R, seed=0):
    """Both channels of a pair share an angle."""
    return torch.randn(*shape, r // 2, generator=torch.Generator().manual_seed(seed)).repeat_interleave(2, -1)


def angles_v2(*shape, r=R, seed=0):
    """Every channel its own angle, as when frequencies repeat in halves."""
    return torch.randn(*shape, r, generator=torch.Generator().manual_seed(seed))


def by_hand(qkv, table, heads):
    x = qkv.double().unflatten(-1, (3, heads, -1))
    table = table.double().expand(qkv.shape[0], *table.shape[-3:])
    out = x.clone()
    for part in (0, 1):
        for c in range(table.shape[-1]):
            partner = -x[:, :, part, :, c + 1] if c % 2 == 0 else x[:, :, part, :, c - 1]
            cos, sin = table[:, :, 0, c, None], table[:, :, 1, c, None]
            out[:, :, part, :, c] = x[:, :, part, :, c] * cos + partner * sin
    return out.flatten(-3)


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def any_table(*shape, seed=0):
    """Angles that differ within a pair, as in variant v2, so that the map is no rotation and its transpose differs."""
    angles = random(*shape, seed=seed)
    return torch.stack((angles.cos(), angles.sin()), -2)


def functional(table, heads):
    return lambda qkv: ops.rope3d(qkv, table.to(qkv.device), heads)


def in_place(table, heads):
    return lambda qkv: ops.rope3d_(qkv.detach().clone(memory_format=torch.preserve_format), table.to(qkv.device), heads)


@pytest.mark.parametrize("angles", [angles_v21(K), angles_v2(K), angles_v2(B, K), angles_v21(B, K, r=D)])
@pytest.mark.parametrize(("dtype", "tol"), [(torch.float64, 1e-12), (torch.float32, 1e-6), (torch.bfloat16, 8e-3)])
def test_formula(angles, dtype, tol):
    qkv, table = torch.randn(B, K, 3 * HEADS * D).to(dtype), table_of(angles)
    out = ops.rope3d(qkv, table, HEADS)
    assert out.dtype == dtype and out.data_ptr() != qkv.data_ptr()
    torch.testing.assert_close(out.double(), by_hand(qkv, table, HEADS), rtol=tol, atol=tol)
    in_place = qkv.clone()
    assert ops.rope3d_(in_place, table, HEADS) is in_place and torch.equal(in_place, out)
    values = slice(2 * HEADS * D, None)
    assert torch.equal(out[..., values], qkv[..., values])


def test_odd_head_dim_and_strided_input():
    table = table_of(angles_v2(K, r=4))
    qkv = torch.randn(B, K, 3 * HEADS * 5 + 1)[..., 1:]
    torch.testing.assert_close(ops.rope3d(qkv, table, HEADS).double(), by_hand(qkv, table, HEADS), rtol=1e-6, atol=1e-6)


def test_v21_keeps_norms_and_depends_on_relative_positions_only():
    freq = torch.tensor([1.0, 0.3, 0.05]).repeat_interleave(2)
    qkv = torch.randn(1, 1, 3 * D, dtype=torch.float64).expand(1, K, -1).contiguous()

    def scores(start):
        x = ops.rope3d(qkv, table_of((torch.arange(K) + start)[:, None] * freq), 1).unflatten(-1, (3, D))
        return x[:, :, 0] @ x[:, :, 1].transpose(1, 2), x[:, :, 0].norm(dim=-1)

    (a, norm), (b, _) = scores(0), scores(9)
    torch.testing.assert_close(a, b, rtol=0, atol=1e-5)  # the table is float32
    torch.testing.assert_close(norm, qkv[:, :, :D].norm(dim=-1), rtol=1e-6, atol=0)


@pytest.mark.parametrize("angles", [angles_v21(K), angles_v2(B, K)])
def test_gradients(angles):
    qkv = torch.randn(B, K, 3 * HEADS * D, dtype=torch.float64, requires_grad=True)
    table = table_of(angles)
    assert torch.autograd.gradcheck(lambda x: ops.rope3d(x, table, HEADS), (qkv,))
    assert torch.autograd.gradgradcheck(lambda x: ops.rope3d(x, table, HEADS), (qkv,))


def test_in_place_refuses_gradients():
    x = torch.randn(B, K, 48, requires_grad=True)
    with pytest.raises(ValueError, match="rope3d_: qkv: .* use rope3d"):
        ops.rope3d_(x * 1, table_of(angles_v2(K)), HEADS)


@pytest.mark.parametrize(
    ("qkv", "table", "text"),
    [
        (torch.zeros(B, K, 50), torch.zeros(K, 2, R), r"qkv: expected a floating tensor \[B,K,3\*E\]"),
        (torch.zeros(K, 48), torch.zeros(K, 2, R), "qkv: .* got float32"),
        (torch.zeros(B, K, 48), torch.zeros(K + 1, 2, R), r"table: expected float32 \[5,2,R\] or \[2,5,2,R\]"),
        (torch.zeros(B, K, 48), torch.zeros(K, 2, D + 2), "table: .* R even and at most 8"),
        (torch.zeros(B, K, 48), torch.zeros(K, 2, 5), "table: .* R even"),
        (torch.zeros(B, K, 48), torch.zeros(B + 1, K, 2, R), "table: "),
        (torch.zeros(B, K, 48), torch.zeros(K, 2, R).double(), r"table: .* got float64 \[5, 2, 6\]"),
    ],
)
def test_argument_errors(qkv, table, text):
    with pytest.raises(ValueError, match="rope3d: " + text):
        ops.rope3d(qkv, table, HEADS)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize(
    ("b", "k", "heads", "d", "r", "own"),
    [
        (2, 5, 3, 64, 60, True),  # heads in three portions on the GPU
        (1, 7, 2, 20, 18, False),
        (3, 1, 1, 2, 2, False),
        (2, 3, 5, 7, 4, True),  # an odd head: pairs are not aligned
        (1, 2, 1, 6, 0, False),  # nothing to rotate
    ],
)
@pytest.mark.parametrize("backend", KERNELS)
def test_values_and_gradients(backend, dtype, b, k, heads, d, r, own):
    table = any_table(*((b,) if own else ()), k, r)
    qkv = random(b, k, 3 * heads * d, seed=1)
    assert_parity(functional(table, heads), [qkv], backend=backend, dtype=dtype, wrt=(0,))
    assert_parity(in_place(table, heads), [qkv], backend=backend, dtype=dtype)


@pytest.mark.parametrize("backend", BACKENDS)
@settings(max_examples=12, deadline=None, derandomize=True, database=None)
@given(data=st.data())
def test_any_shape(backend, data):
    b, k, heads, d = (
        data.draw(st.integers(1, most), label=name) for name, most in (("b", 3), ("k", 6), ("heads", 4), ("d", 40))
    )
    r = 2 * data.draw(st.integers(0, d // 2), label="r/2")
    table = any_table(*((b,) if data.draw(st.booleans()) else ()), k, r)
    dtype = data.draw(st.sampled_from(FLOATS))
    assert_parity(functional(table, heads), [random(b, k, 3 * heads * d)], backend=backend, dtype=dtype, wrt=(0,))


@pytest.mark.parametrize("backend", KERNELS)
def test_strided_inputs_tables_and_gradients(backend):
    table = any_table(8, 4, seed=3).transpose(0, 2).contiguous().transpose(0, 2)[::2]
    wide = lambda qkv: functional(table, 2)(qkv[:, ::2, 1:]).transpose(0, 2)  # noqa: E731
    assert_parity(wide, [random(3, 8, 3 * 2 * 6 + 1)], backend=backend, wrt=(0,))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("b", "k"), [(0, 4), (2, 0)])
def test_nothing_to_do(backend, b, k):
    qkv = torch.zeros(b, k, 48, device=device_for(backend), requires_grad=True)
    table = any_table(k, 4).to(qkv.device)
    with ops.use_backend(backend):
        out = ops.rope3d(qkv, table, 2)
        assert out.shape == qkv.shape and torch.autograd.grad(out.sum(), qkv)[0].shape == qkv.shape
        ops.rope3d_(qkv.detach(), table, 2)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_only_rotated_channels_change_and_only_of_this_tensor(backend, dtype):
    """The rest is equal bit for bit even beside infinities, and so is the memory around a tensor turned in place."""
    b, k, heads, d, r = 2, 3, 3, 10, 6
    device = device_for(backend)
    around = random(b + 2, k, 3 * heads * d).to(device, dtype)
    around.unflatten(-1, (3, heads, d))[:, :, :2, :, 0] = float("inf")
    before, qkv = around.clone(), around[1:-1]
    table = any_table(k, r).to(device)
    with ops.use_backend(backend):
        out = ops.rope3d(qkv, table, heads)
        assert torch.equal(around, before)
        ops.rope3d_(qkv, table, heads)
    torch.testing.assert_close(qkv, out, rtol=0, atol=0, equal_nan=True)
    assert torch.equal(around[:: b + 1], before[:: b + 1])
    new, old = out.unflatten(-1, (3, heads, d)), before[1:-1].unflatten(-1, (3, heads, d))
    assert torch.equal(new[:, :, 2], old[:, :, 2]) and torch.equal(new[..., r:], old[..., r:])
    assert not torch.equal(new[:, :, :2, :, 1:r], old[:, :, :2, :, 1:r])


@pytest.mark.parametrize("backend", KERNELS)
def test_in_place_needs_dense_memory(backend):
    strided = random(3, 4, 48).to(device_for(backend))[:, ::2]
    table = any_table(2, 4).to(strided.device)
    expected = ops.rope3d(strided, table, 2)
    with ops.use_backend(backend), pytest.raises(ops.BackendError, match="in place, qkv must be contiguous"):
        ops.rope3d_(strided, table, 2)
    torch.testing.assert_close(ops.rope3d_(strided, table, 2), expected)  # auto: eager code


@pytest.mark.parametrize(
    ("backend", "dtype", "text"),
    [
        (KERNELS[0], torch.float16, "cpp supports float32, bfloat16, got float16"),
        (KERNELS[0], torch.float64, "cpp supports float32, bfloat16, got float64"),
        (KERNELS[1], torch.float64, "triton computes in float32"),
    ],
)
def test_dtypes_that_are_left_to_eager(backend, dtype, text):
    backend = backend.values[0]
    qkv = random(1, 2, 12).to(device_for(backend), dtype)
    table = any_table(2, 4).to(qkv.device)
    with ops.use_backend(backend), pytest.raises(ops.BackendError, match=text):
        ops.rope3d(qkv, table, 1)
    assert ops.rope3d(qkv, table, 1).dtype == dtype


@pytest.mark.parametrize("backend", KERNELS[1:])
def test_float16(backend):
    assert_parity(functional(any_table(3, 4), 2), [random(2, 3, 36)], backend=backend, dtype=torch.float16, wrt=(0,))


@pytest.mark.parametrize("backend", KERNELS[:1])
@pytest.mark.parametrize("dtype", FLOATS)
def test_threads_do_not_matter(backend, dtype):
    qkv, table = random(4, 300, 3 * 2 * 64).to(dtype), any_table(4, 300, 60)
    threads = torch.get_num_threads()
    try:
        with ops.use_backend(backend):
            torch.set_num_threads(1)
            one = ops.rope3d(qkv, table, 2)
            torch.set_num_threads(3)
            assert torch.equal(ops.rope3d(qkv, table, 2), one)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("backend", BACKENDS)
def test_opcheck_and_compile(backend):
    device = device_for(backend)
    table = any_table(3, 4).to(device)
    x = random(2, 3, 36).to(device)
    with ops.use_backend(backend):
        torch.library.opcheck(_rope3d, (x.clone().requires_grad_(), table, 2))
        torch.library.opcheck(_rope3d_transpose, (x.transpose(0, 1).contiguous().transpose(0, 1), table, 2))
        torch.library.opcheck(_rope3d_inplace, (x, table, 2))
        x = x.clone().requires_grad_()
        fn = lambda x: (ops.rope3d(x * 2, table, 2).sin()).sum()  # noqa: E731
        compiled = torch.compile(fn, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(*(torch.autograd.grad(f(x), x)[0] for f in (fn, compiled)))
        with torch.no_grad():
            in_place = torch.compile(lambda x: ops.rope3d_(x * 2, table, 2), fullgraph=True, backend="aot_eager")
            torch.testing.assert_close(in_place(x), ops.rope3d(x * 2, table, 2))
