"""target_norm: published values, torch's own layer norm, and every backend against eager code in float64."""

import pathlib

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from tests.draws import given, settings, st
from tests.ops.parity import BACKENDS, KERNELS, assert_parity, device_for
from vjepa_fast import ops
from vjepa_fast.ops import _cpp
from vjepa_fast.ops.norm import _target_norm, _target_norm_backward, layer_norm_again, layer_norm_backward

GOLDENS = pathlib.Path(__file__).parent.parent / "goldens"
FLOATS = [torch.float32, torch.bfloat16]


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def norm(levels):
    return lambda h: ops.target_norm(h, levels)


@pytest.mark.parametrize(("dtype", "name", "tol"), [(torch.float32, "f32", 1e-5), (torch.float64, "f64", 1e-10)])
def test_golden_values_and_gradients(dtype, name, tol):
    with np.load(GOLDENS / "losses_small.npz") as data:
        keys = ("in", "cot", f"out/{name}", f"grad_noema/{name}")
        h, cot, out, grad = (torch.from_numpy(data[f"target_ln/{k}"]).to(dtype) for k in keys)
    h.requires_grad_()
    result = ops.target_norm(h, 4)
    torch.testing.assert_close(result, out, rtol=tol, atol=tol)
    torch.testing.assert_close(torch.autograd.grad(result, h, cot)[0], grad, rtol=tol, atol=tol * grad.abs().max())


@pytest.mark.parametrize("levels", [1, 3])
def test_each_level_is_a_layer_norm(levels):
    h = torch.randn(2, 5, 12, dtype=torch.float64) * 3 + 1
    expected = torch.cat([F.layer_norm(x, x.shape[-1:]) for x in h.chunk(levels, -1)], -1)
    torch.testing.assert_close(ops.target_norm(h, levels), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("h", "levels", "text"),
    [
        (torch.zeros(2, 10), 4, r"h: expected .* with D a multiple of levels=4, got float32 \[2, 10\]"),
        (torch.zeros(2, 8, dtype=torch.int64), 4, "h: expected a floating tensor .* got int64"),
        (torch.zeros(2, 8), 0, "levels: expected a positive int, got 0"),
    ],
)
def test_argument_errors(h, levels, text):
    with pytest.raises(ValueError, match="target_norm: " + text):
        ops.target_norm(h, levels)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize(
    ("shape", "levels"),
    [
        ((2, 5, 96), 4),  # E = 24
        ((3, 3072), 4),
        ((2, 6656), 4),
        ((1, 6656), 1),
        ((3, 2, 2, 7), 1),
        ((4, 6), 6),  # E = 1: zeros
        ((5,), 1),
    ],
)
@pytest.mark.parametrize("backend", KERNELS)
def test_values_and_gradients(backend, dtype, shape, levels):
    assert_parity(norm(levels), [3 * random(*shape) + 1], backend=backend, dtype=dtype, wrt=(0,))


@pytest.mark.parametrize("backend", BACKENDS)
@settings(max_examples=12, deadline=None, derandomize=True, database=None)
@given(rows=st.integers(1, 9), levels=st.integers(1, 4), channels=st.integers(1, 70), dtype=st.sampled_from(FLOATS))
def test_any_shape(backend, rows, levels, channels, dtype):
    assert_parity(norm(levels), [random(rows, levels * channels)], backend=backend, dtype=dtype, wrt=(0,))


@pytest.mark.parametrize("mean", [100.0, -3000.0])
@pytest.mark.parametrize("backend", KERNELS)
def test_a_mean_far_from_zero(backend, mean):
    assert_parity(norm(2), [random(6, 3328) + mean], backend=backend, wrt=(0,))


@pytest.mark.parametrize("backend", KERNELS)
def test_constant_rows_and_tiny_deviations(backend):
    """The eps decides: constant channels give zeros, and the gradient stays finite."""
    h = torch.cat([torch.full((1, 8), 5.0), torch.zeros(1, 8), 1e-4 * random(1, 8)])
    assert_parity(norm(1), [h], backend=backend, wrt=(0,), atol=1e-4)
    with ops.use_backend(backend):
        assert not ops.target_norm(h[:2].to(device_for(backend)), 1).any()


@pytest.mark.parametrize("backend", KERNELS)
def test_strided_inputs_and_gradients(backend):
    fn = lambda h: ops.target_norm(h[:, ::2, 1:], 2).transpose(0, 2)  # noqa: E731
    assert_parity(fn, [random(3, 8, 21)], backend=backend, wrt=(0,))
    assert_parity(lambda h: ops.target_norm(h.t(), 3).t(), [random(12, 5)], backend=backend, wrt=(0,))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", [(0, 3, 8), (2, 0, 8)])
def test_nothing_to_do(backend, shape):
    h = torch.zeros(shape, device=device_for(backend), requires_grad=True)
    with ops.use_backend(backend):
        out = ops.target_norm(h, 2)
        assert out.shape == shape and torch.autograd.grad(out.sum(), h)[0].shape == shape


@pytest.mark.parametrize(
    ("backend", "dtype", "text"),
    [
        (KERNELS[0], torch.float16, "cpp supports float32, bfloat16, got float16"),
        (KERNELS[1], torch.float64, "triton computes in float32"),
    ],
)
def test_dtypes_that_are_left_to_eager(backend, dtype, text):
    backend = backend.values[0]
    h = random(2, 8).to(device_for(backend), dtype)
    with ops.use_backend(backend), pytest.raises(ops.BackendError, match=text):
        ops.target_norm(h, 2)
    assert ops.target_norm(h, 2).dtype == dtype


@pytest.mark.parametrize("backend", KERNELS[1:])
def test_float16_and_the_longest_row(backend):
    assert_parity(norm(2), [random(3, 40)], backend=backend, dtype=torch.float16, wrt=(0,))
    assert_parity(norm(1), [random(1, 16384)], backend=backend)
    h = torch.zeros(1, 16385, device=device_for(backend))
    with ops.use_backend(backend), pytest.raises(ops.BackendError, match="at most 16384 channels per level"):
        ops.target_norm(h, 1)


@pytest.mark.parametrize("backend", KERNELS[:1])
@pytest.mark.parametrize("dtype", FLOATS)
def test_threads_do_not_matter(backend, dtype):
    h = random(500, 96).to(dtype).requires_grad_()
    cotangent = random(500, 96, seed=1).to(dtype)
    threads, results = torch.get_num_threads(), []
    try:
        with ops.use_backend(backend):
            for n in (1, 3):
                torch.set_num_threads(n)
                out = ops.target_norm(h, 4)
                results.append((out, *torch.autograd.grad(out, h, cotangent)))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for a, b in zip(*results))


def test_bfloat16_is_normalised_in_float32_and_stored_as_bfloat16():
    h = (torch.randn(4, 64) + 30).bfloat16()  # a mean far from 0: bfloat16 statistics would be off
    out = ops.target_norm(h, 2)
    assert out.dtype == torch.bfloat16
    assert torch.equal(out, ops.target_norm(h.float(), 2).bfloat16())


def test_gradcheck():
    h = torch.randn(2, 3, 8, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: ops.target_norm(x, 2), (h,))


@pytest.mark.parametrize("backend", BACKENDS)
def test_opcheck_and_compile(backend):
    h = random(2, 3, 8).to(device_for(backend))
    with ops.use_backend(backend):
        for x in (h.clone().requires_grad_(), h.transpose(0, 1).bfloat16(), h[:0]):
            torch.library.opcheck(_target_norm, (x, 2))
        torch.library.opcheck(_target_norm_backward, (h, h.transpose(0, 1).contiguous().transpose(0, 1), 2))
        x = h.clone().requires_grad_()
        fn = lambda x: (ops.target_norm(x * 2, 2) ** 3).sum()  # noqa: E731
        compiled = torch.compile(fn, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(*(torch.autograd.grad(f(x), x)[0] for f in (fn, compiled)), rtol=1e-5, atol=1e-5)


@pytest.mark.skipif(not _cpp.LOADED, reason=_cpp.REASON or "-")
@pytest.mark.parametrize("shape", [(3, 17, 48), (70, 5), (1, 7)])
def test_layer_norm_of_a_block(shape):
    x, grad, before = (random(*shape, seed=n) for n in range(3))
    weight, bias = random(shape[-1], seed=3), random(shape[-1], seed=4)
    out, mean, rstd = torch.native_layer_norm(x, shape[-1:], weight, bias, 1e-6)
    torch.testing.assert_close(layer_norm_again(x, mean, rstd, weight, bias), out, rtol=1e-5, atol=1e-6)
    doubles = [v.double().requires_grad_() for v in (x, weight, bias)]
    wanted = torch.autograd.grad(F.layer_norm(doubles[0], shape[-1:], *doubles[1:], 1e-6), doubles, grad.double())
    dx = before.clone()
    dw, db = layer_norm_backward(grad, x, mean, rstd, weight, dx)
    for got, want in zip((dx - before, dw, db), wanted):
        torch.testing.assert_close(got.double(), want, rtol=1e-4, atol=2e-5)
