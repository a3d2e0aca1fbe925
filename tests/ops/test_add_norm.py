"""Sum, LayerNorm and their gradients in one pass: against autograd through the plain form."""

import pytest
import torch
import torch.nn.functional as F

from tests.ops.parity import KERNELS, assert_parity, device_for
from vjepa_fast import ops
from vjepa_fast.ops.add_norm import _add_norm, _add_norm_backward, add_norm, add_norm_backward

FLOATS = [torch.float32, torch.bfloat16]
TRITON = KERNELS[1:]
EPS = 1e-6


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def forward(x, y, shift, weight, bias):
    out = torch.empty_like(x)
    total, mean, rstd = add_norm(x, y, shift, weight, bias, EPS, out)
    return total, out, mean, rstd


def gradients(total, grad, rest, weight, bias):
    """The three results of the backward, the statistics of the forward being exact."""
    mean = total.mean(-1, dtype=torch.float32)
    rstd = (total.float().var(-1, unbiased=False) + EPS).rsqrt()
    if total.dtype == torch.float64:
        mean, rstd = total.mean(-1), (total.var(-1, unbiased=False) + EPS).rsqrt()
    found = add_norm_backward(grad, total, rest, weight, bias, mean, rstd)
    return [t.clone() for t in found]  # gradients of empty ones are not asked for


def inputs(rows, channels):
    return [2 * random(rows, channels, seed=n) + 0.3 for n in range(3)], [
        random(channels, seed=9 + n) for n in range(3)
    ]


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize(("rows", "channels"), [(9, 768), (70, 20), (1, 1)])
@pytest.mark.parametrize("backend", TRITON)
def test_values(backend, rows, channels, dtype):
    (x, y, grad), (shift, weight, bias) = inputs(rows, channels)
    assert_parity(forward, [x, y, shift, weight, bias], backend=backend, dtype=dtype)
    assert_parity(forward, [x, y, None, weight, bias], backend=backend, dtype=dtype)
    atol = 1e-5 if channels > 1 else 1e-4  # of one channel the variance is 0: rounding errors times eps**-0.5
    for rest, again in ((y, bias), (None, None)):
        assert_parity(gradients, [x, grad, rest, weight, again], backend=backend, dtype=dtype, atol=atol)


@pytest.mark.parametrize("backend", ["eager", *TRITON])
def test_gradients_are_those_of_the_plain_form(backend):
    (x, y, grad), vectors = inputs(19, 40)
    (rest, *_), device = inputs(19, 40)[0], device_for(backend)
    leaves = [t.clone().requires_grad_() for t in (x, y, *vectors)]
    total = leaves[0] + leaves[1] + leaves[2]
    out = F.layer_norm(total, (40,), *leaves[3:], EPS)
    want = torch.autograd.grad([total, out], leaves, [rest, grad])
    x, y, grad, rest, *vectors = (t.float().to(device) for t in (x, y, grad, rest, *vectors))
    with ops.use_backend(backend):
        total, normed, mean, rstd = forward(x, y, *vectors)
        dx, again, sums = add_norm_backward(grad, total, rest, *vectors[1:], mean, rstd)
    assert torch.equal(again, normed) or (again - normed).abs().max() < 1e-5
    got = [dx, dx, sums[2], sums[0], sums[1]]
    for g, w in zip(got, want):
        torch.testing.assert_close(g.double().cpu(), w, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("backend", ["eager", *TRITON])
def test_levels_side_by_side(backend):
    """Rows of the result and of its gradient may lie apart, and the dtypes of stream and result may differ."""
    device = device_for(backend)
    x, weight, bias = (t.float().to(device) for t in (random(9, 24), random(24, seed=1), random(24, seed=2)))
    joined = torch.zeros(9, 72, dtype=torch.bfloat16, device=device)
    with ops.use_backend(backend):
        _, mean, rstd = add_norm(x, None, None, weight, bias, EPS, joined[:, 24:48])
        want = F.layer_norm(x, (24,), weight, bias, EPS)
        torch.testing.assert_close(joined[:, 24:48].float(), want, rtol=1e-2, atol=1e-2)
        assert not joined[:, :24].any() and not joined[:, 48:].any()
        grad = random(9, 72, seed=3).to(device).float()
        apart = add_norm_backward(grad[:, 24:48], x, None, weight, None, mean, rstd)
        whole = add_norm_backward(grad[:, 24:48].contiguous(), x, None, weight, None, mean, rstd)
    assert all(torch.equal(a, b) for a, b in zip(apart, whole))


@pytest.mark.parametrize("backend", TRITON)
def test_a_mean_far_from_zero_and_constant_rows(backend):
    weight, bias = random(256, seed=1), random(256, seed=2)
    for x in (random(4, 256) + 3000, torch.full((2, 256), 5.0, dtype=torch.float64)):
        assert_parity(lambda *a: forward(*a)[1], [x.float(), None, None, weight, bias], backend=backend, atol=1e-5)


@pytest.mark.parametrize("backend", ["eager", *TRITON])
def test_opcheck_and_nothing_to_do(backend):
    device = device_for(backend)
    (x, y, grad), vectors = inputs(5, 24)
    x, y, grad, shift, weight, bias = (t.float().to(device) for t in (x, y, grad, *vectors))
    mean = rstd = torch.ones(5, device=device)
    tests = ("test_schema", "test_faketensor")
    with ops.use_backend(backend):
        for add in ((y, shift), (None, None)):
            torch.library.opcheck(_add_norm, (x, *add, weight, bias, EPS, torch.empty_like(x)), test_utils=tests)
        for rest, again in ((y, bias), (None, None)):
            torch.library.opcheck(_add_norm_backward, (grad, x, rest, weight, again, mean, rstd), test_utils=tests)
        none = x[:0]
        total, out, *stats = forward(none, none, shift, weight, bias)
        assert total.shape == out.shape == (0, 24)
        dx, again, sums = add_norm_backward(none, none, None, weight, bias, *stats)
    assert dx.shape == again.shape == (0, 24) and not sums.any()


def test_rows_that_are_too_long_are_left_to_eager():
    x, w = torch.zeros(1, 8193), torch.ones(8193)
    with ops.use_backend("triton"), pytest.raises(ops.BackendError, match="at most 8192 channels"):
        forward(x, None, None, w, w)
