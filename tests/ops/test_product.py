"""float32 products: eager code bit for bit as PyTorch's, kernels within twice the error of a plain float32 product."""

import pytest
import torch
from torch.autograd import gradcheck
from torch.nn import functional as F

from tests.ops.parity import DEVICE, assert_parity
from vjepa_fast import ops

triton = pytest.importorskip("triton")


def random(*shape, seed=0, scale=1.0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * scale


def wide(x):
    return x.to(torch.promote_types(x.dtype, torch.float32))


def linear(x, w, b):
    return ops.linear32(x, wide(w), wide(b))


def matmul(x, w):
    return ops.matmul32(x, wide(w))


def covariance(offsets, width, period):
    return lambda z: list(ops.cross_covariance(z, offsets.to(z.device), width, period))


@pytest.mark.parametrize(
    ("dtype", "shape"),
    [
        (torch.float32, (2, 66, 48, 70)),
        (torch.bfloat16, (2, 66, 48, 70)),
        (torch.float32, (1, 3, 64, 3)),
        (torch.float16, (1, 3, 64, 3)),
    ],
)
def test_linear_within_twice_the_error_of_a_float32_product(dtype, shape):
    b, k, inputs, outputs = shape
    args = random(b, k, inputs), random(outputs, inputs, seed=1, scale=0.05), random(outputs, seed=2)
    assert_parity(linear, args, backend="triton", dtype=dtype, wrt=(0, 1, 2), atol=1e-7)


@pytest.mark.parametrize("scale", [1e-18, 1e15])
def test_long_sums_and_any_magnitude(scale):
    """The sums over rows of a weight's gradient are cut into pieces; powers of two keep everything in reach of fp16."""
    x, w = random(1100, 40, scale=scale), random(40, 24, seed=1, scale=1 / scale)
    assert_parity(matmul, [x, w], backend="triton", wrt=(0, 1), atol=0.0)


def test_strides_and_parts_of_a_matrix():
    x, w = random(20, 3, 48), random(40, 96, seed=1)

    def fn(x, w):
        return ops.matmul32(x.transpose(0, 1)[..., 16:], w.tensor_split((32,), dim=1)[0].t()[:, 3:])

    assert_parity(fn, [x, w], backend="triton", wrt=(0, 1), atol=1e-7)


@pytest.mark.parametrize(
    ("dtype", "width", "period"), [(torch.float32, 40, 96), (torch.float32, 7, 32), (torch.bfloat16, 40, 96)]
)
def test_covariance_within_twice_the_error_of_a_float32_product(dtype, width, period):
    """Groups of any size, an empty one too; channels whose mean is large beside their deviation."""
    z = random(200, 96) + 4 * random(96, seed=1) * random(96, seed=2).gt(1)
    assert_parity(
        covariance(torch.tensor([0, 37, 37, 140, 200]), width, period), [z], backend="triton", dtype=dtype, wrt=(0,)
    )


@pytest.mark.parametrize("backend", ["eager", "triton"])
def test_rows_of_no_group_may_hold_anything(backend):
    z = random(90, 16).to(DEVICE)
    z[70:] = float("nan")
    z.requires_grad_()
    offsets = torch.tensor([0, 30, 70], device=DEVICE)
    with ops.use_backend(backend):
        found = ops.cross_covariance(z, offsets, 8, 16)
        sum(c.square().sum() for c in found).backward()
        alone = [ops.cross_covariance(part, None, 8, 16)[0] for part in (z[:30], z[30:70])]
    torch.testing.assert_close(list(found), alone, rtol=1e-5, atol=1e-4)
    assert torch.equal(z.grad[70:], torch.zeros_like(z[70:])) and z.grad[:70].isfinite().all()


def test_covariance_is_what_numpy_says():
    z = random(40, 12).double().requires_grad_()
    (got,) = ops.cross_covariance(z, None, 2, 4)
    own = torch.arange(12) % 4 < 2
    torch.testing.assert_close(got / 39, torch.cov(z.detach().t())[own][:, ~own], rtol=1e-12, atol=1e-12)
    assert gradcheck(lambda z: tuple(ops.cross_covariance(z, torch.tensor([0, 9, 40]), 2, 4)), (z,))


@pytest.mark.parametrize("backend", ["auto", "eager"])
def test_eager_code_is_pytorchs_bit_for_bit(backend):
    x, w, b = (random(*shape, seed=n) for n, shape in enumerate([(2, 9, 24), (8, 24), (8,)]))
    with ops.use_backend(backend):
        assert torch.equal(ops.linear32(x.bfloat16(), w, b), ops.linear.linear(x.bfloat16().float(), w, b))
        assert torch.equal(ops.matmul32(x, w.t()), x @ w.t())
    torch.testing.assert_close(
        ops.linear32(x.double(), w.double(), b.double()), F.linear(x.double(), w.double(), b.double())
    )


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_stays_so(bad):
    x = random(20, 16).to(DEVICE)
    x[3, 4] = bad
    with ops.use_backend("triton"):
        assert not ops.matmul32(x, random(16, 5).to(DEVICE))[3].isfinite().any()
        assert not ops.cross_covariance(x, None, 8, 16)[0].isfinite().all()


def test_nothing_is_kept_that_is_not_given(monkeypatch):
    """No float32 copy of features for the backward pass, and the bits of a second run are those of the first."""
    x = random(30, 32).bfloat16().to(DEVICE).requires_grad_()
    w, kept = random(8, 32).to(DEVICE).requires_grad_(), []
    with (
        ops.use_backend("triton"),
        torch.autograd.graph.saved_tensors_hooks(lambda t: (kept.append(t), t)[1], lambda t: t),
    ):
        y = ops.linear32(x, w)
        ops.cross_covariance(x, None, 16, 32)
    assert y.dtype == torch.float32
    assert max(t.numel() * t.element_size() for t in kept) == x.numel() * 2


def test_argument_errors():
    x, w = torch.zeros(4, 6), torch.zeros(2, 5)
    for call, text in (
        (lambda: ops.linear32(x, w), r"linear32: x: expected a floating tensor \[...,5\], got float32 \[4, 6\]"),
        (lambda: ops.matmul32(x, w), "matmul32: x: expected"),
        (lambda: ops.matmul32(x, w[0]), "matmul32: weight: expected a floating tensor of two dimensions"),
        (lambda: ops.cross_covariance(x, None, 2, 4), "period: expected a divisor of 6"),
        (lambda: ops.cross_covariance(x, None, 3, 3), "width: expected from 1 to 2"),
        (lambda: ops.cross_covariance(x, torch.zeros(1, dtype=torch.int64), 1, 3), "offsets: expected"),
        (lambda: ops.cross_covariance(x[0], None, 1, 3), "z: expected"),
    ):
        with pytest.raises(ValueError, match=text):
            call()


def test_float64_and_other_dtypes_are_left_to_eager():
    x = torch.zeros(4, 6, dtype=torch.float64)
    with ops.use_backend("triton"), pytest.raises(ops.BackendError, match="float64 is left to eager"):
        ops.matmul32(x, x.t())


def emulated(x, w, chunk=32):
    """The kernels' arithmetic, in PyTorch: two fp16 parts by a power of two, three products, sums in float32."""

    def parts(v):
        scale = 2.0 ** (14 - torch.frexp(v.abs().max()).exponent.item())
        high = (v * scale).half()
        return high.float(), (v * scale - high.float()).half().float(), scale

    (xh, xl, xs), (wh, wl, ws) = parts(x), parts(w)
    total = torch.zeros(len(x), w.shape[1])
    for k in range(0, x.shape[1], chunk):
        total += sum(a[:, k : k + chunk] @ b[k : k + chunk] for a, b in ((xl, wh), (xh, wl), (xh, wh)))
    return total / xs / ws


@pytest.mark.parametrize("inputs", [256, 4096])
def test_the_split_loses_less_than_a_float32_product_does(inputs):
    """The same numbers without Triton: where bf16 x 3 would lose 2^-16 of a number, this stays with float32."""
    x, w = random(64, inputs), random(inputs, 64, seed=1)
    exact = x.double() @ w.double()
    plain = torch.zeros(64, 64)
    for k in range(inputs):  # as a chain of fused multiply-adds has it
        plain += x[:, k : k + 1] * w[k : k + 1]
    error = (emulated(x, w).double() - exact).abs().max()
    assert error <= 2 * (x @ w - exact).abs().max() and error <= (plain - exact).abs().max()
    bf16 = x.bfloat16().float(), (x - x.bfloat16().float()).bfloat16().float()
    three = bf16[0] @ w.bfloat16().float() + bf16[1] @ w.bfloat16().float()
    three = three + bf16[0] @ (w - w.bfloat16().float()).bfloat16().float()
    assert (three.double() - exact).abs().max() > 4 * error
