"""rope3d of every backend against eager code in float64."""

import pytest
import torch

from tests.draws import given, settings, st
from tests.ops.parity import BACKENDS, KERNELS, assert_parity, device_for
from vjepa_fast import ops
from vjepa_fast.ops.rope import _rope3d, _rope3d_inplace, _rope3d_transpose

FLOATS = [torch.float32, torch.bfloat16]


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def table_of(*shape, seed=0):
    """Angles that differ within a pair, as in variant v2, so that the map is no rotation and its transpose differs."""
    angles = random(*shape, seed=seed)
    return torch.stack((angles.cos(), angles.sin()), -2)


def functional(table, heads):
    return lambda qkv: ops.rope3d(qkv, table.to(qkv.device), heads)


def in_place(table, heads):
    return lambda qkv: ops.rope3d_(qkv.detach().clone(memory_format=torch.preserve_format), table.to(qkv.device), heads)


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
    table = table_of(*((b,) if own else ()), k, r)
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
    table = table_of(*((b,) if data.draw(st.booleans()) else ()), k, r)
    dtype = data.draw(st.sampled_from(FLOATS))
    assert_parity(functional(table, heads), [random(b, k, 3 * heads * d)], backend=backend, dtype=dtype, wrt=(0,))


@pytest.mark.parametrize("backend", KERNELS)
def test_strided_inputs_tables_and_gradients(backend):
    table = table_of(8, 4, seed=3).transpose(0, 2).contiguous().transpose(0, 2)[::2]
    wide = lambda qkv: functional(table, 2)(qkv[:, ::2, 1:]).transpose(0, 2)  # noqa: E731
    assert_parity(wide, [random(3, 8, 3 * 2 * 6 + 1)], backend=backend, wrt=(0,))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("b", "k"), [(0, 4), (2, 0)])
def test_nothing_to_do(backend, b, k):
    qkv = torch.zeros(b, k, 48, device=device_for(backend), requires_grad=True)
    table = table_of(k, 4).to(qkv.device)
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
    table = table_of(k, r).to(device)
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
    table = table_of(2, 4).to(strided.device)
    expected = ops.rope3d(strided, table, 2)
    with ops.use_backend(backend), pytest.raises(ops.BackendError, match="in place, qkv must be contiguous"):
        ops.rope3d_(strided, table, 2)
    torch.testing.assert_close(ops.rope3d_(strided, table, 2), expected)  # auto: eager code


@pytest.mark.parametrize(
    ("backend", "dtype", "text"),
    [
        (KERNELS[0], torch.float16, "cpp serves float32 and bfloat16, not torch.float16"),
        (KERNELS[0], torch.float64, "cpp serves float32 and bfloat16, not torch.float64"),
        (KERNELS[1], torch.float64, "triton computes in float32"),
    ],
)
def test_dtypes_that_are_left_to_eager(backend, dtype, text):
    backend = backend.values[0]
    qkv = random(1, 2, 12).to(device_for(backend), dtype)
    table = table_of(2, 4).to(qkv.device)
    with ops.use_backend(backend), pytest.raises(ops.BackendError, match=text):
        ops.rope3d(qkv, table, 1)
    assert ops.rope3d(qkv, table, 1).dtype == dtype


@pytest.mark.parametrize("backend", KERNELS[1:])
def test_float16(backend):
    assert_parity(functional(table_of(3, 4), 2), [random(2, 3, 36)], backend=backend, dtype=torch.float16, wrt=(0,))


@pytest.mark.parametrize("backend", KERNELS[:1])
@pytest.mark.parametrize("dtype", FLOATS)
def test_threads_do_not_matter(backend, dtype):
    qkv, table = random(4, 300, 3 * 2 * 64).to(dtype), table_of(4, 300, 60)
    threads = torch.get_num_threads()
    try:
        with ops.use_backend(backend):
            torch.set_num_threads(1)
            one = ops.rope3d(qkv, table, 2)
            torch.set_num_threads(3)
            assert torch.equal(ops.rope3d(qkv, table, 2), one)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("backend", KERNELS)
def test_opcheck_and_compile(backend):
    device = device_for(backend)
    table = table_of(3, 4).to(device)
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
