"""Linear layers on a CPU: both products against F.linear, the gradients of a weight, the layers of a block in C++."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F

from vjepa_fast.ops import _cpp
from vjepa_fast.ops import linear as module
from vjepa_fast.ops.linear import (
    add_outer,
    block_linear,
    block_linear_backward,
    feed_forward,
    feed_forward_backward,
    has_product,
    linear,
    linear_gelu,
    product,
)

needs_cpp = pytest.mark.skipif(not _cpp.LOADED, reason=_cpp.REASON or "-")
needs_product = pytest.mark.skipif(not has_product(), reason="this PyTorch has no oneDNN product")
FUNCTIONS = {"linear": (linear, F.linear), "gelu": (linear_gelu, lambda *args: F.gelu(F.linear(*args)))}


@pytest.fixture(params=[pytest.param("onednn", marks=needs_product), "mkl"])
def which(request, monkeypatch):
    """The product that runs: oneDNN's, or PyTorch's own choice where there is none."""
    if request.param == "mkl":
        monkeypatch.setattr(module, "has_product", lambda: False)
    return request.param


def some(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


STRIDED = {
    "plain": lambda w: w,
    "transposed": lambda w: w.t().contiguous().t(),
    "every other column": lambda w: w.repeat_interleave(2, 1)[:, ::2],
    "expanded": lambda w: w[:1].expand(len(w), -1),
}


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("strides", STRIDED)
@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize("shape", [(5,), (7, 5), (2, 3, 5)])
def test_values_and_gradients(which, shape, name, strides, bias):
    ours, theirs = FUNCTIONS[name]
    x, w, b = some(*shape), STRIDED[strides](some(4, 5, seed=1)), some(4, seed=2) if bias else None
    exact = [None if t is None else t.double().requires_grad_() for t in (x, w, b)]
    want = theirs(*exact)
    cotangent = some(*want.shape, seed=3)
    leaves = [None if t is None else t.detach().requires_grad_() for t in (x, w, b)]
    got = ours(*leaves)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-6)
    with torch.no_grad():  # one pass for the GELU
        torch.testing.assert_close(ours(x, w, b).double(), want, rtol=1e-5, atol=1e-6)
    mine = torch.autograd.grad(got, [t for t in leaves if t is not None], cotangent)
    exactly = torch.autograd.grad(want, [t for t in exact if t is not None], cotangent.double())
    for a, e in zip(mine, exactly):
        torch.testing.assert_close(a.double(), e, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("wanted", ["x", "w", "b", "xw", "xb", "wb"])
def test_only_the_gradients_that_are_asked_for(which, wanted):
    leaves = {k: some(*shape).requires_grad_(k in wanted) for k, shape in (("x", (6, 5)), ("w", (4, 5)), ("b", (4,)))}
    linear(*leaves.values()).backward(some(6, 4, seed=3))
    assert {k for k, t in leaves.items() if t.grad is not None} == set(wanted)
    plain = {k: t.detach().clone().requires_grad_(k in wanted) for k, t in leaves.items()}
    F.linear(*plain.values()).backward(some(6, 4, seed=3))
    for k in wanted:
        torch.testing.assert_close(leaves[k].grad, plain[k].grad, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("shape", [(0, 5), (2, 0, 5)])
def test_no_rows(which, shape):
    x, w, b = some(*shape).requires_grad_(), some(4, 5).requires_grad_(), some(4).requires_grad_()
    for fn in (linear, linear_gelu):
        out = fn(x, w, b)
        assert out.shape == (*shape[:-1], 4)
        dx, dw, db = torch.autograd.grad(out.sum(), (x, w, b))
        assert dx.shape == x.shape and not dw.any() and not db.any()


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_dtypes_are_pytorchs(which, dtype):
    args = some(3, 5, dtype=dtype), some(4, 5, seed=1, dtype=dtype), some(4, seed=2, dtype=dtype)
    for ours, theirs in FUNCTIONS.values():
        assert torch.equal(ours(*args), theirs(*args))


def test_under_autocast(which):
    args = some(3, 5), some(4, 5, seed=1), some(4, seed=2)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        for ours, theirs in FUNCTIONS.values():
            assert ours(*args).dtype == torch.bfloat16 and torch.equal(ours(*args), theirs(*args))


def test_compiled_in_one_graph(which):
    def fn(x, w, b):
        return linear_gelu(linear(x, w, b), w[:, :4]).sum()

    args = [t.requires_grad_() for t in (some(3, 5), some(4, 5, seed=1), some(4, seed=2))]
    compiled = torch.compile(fn, fullgraph=True, backend="aot_eager")
    for got, want in zip(torch.autograd.grad(compiled(*args), args), torch.autograd.grad(fn(*args), args)):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


@needs_product
def test_a_second_derivative_is_refused():
    x, w = some(3, 5).requires_grad_(), some(4, 5).requires_grad_()
    (dx,) = torch.autograd.grad(linear(x, w).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiate twice|does not require grad"):
        dx.sum().backward()


@needs_product
def test_the_product_is_found_whatever_mode_the_first_call_is_under():
    module._onednn.cache_clear()
    with torch.inference_mode(), torch.device("meta"):
        assert has_product()


def test_without_the_product(monkeypatch):
    monkeypatch.setattr(module, "_onednn", lambda: None)
    assert not has_product()
    with pytest.raises(RuntimeError, match="no oneDNN product; use F.linear"):
        product(some(3, 5), some(4, 5))
    torch.testing.assert_close(linear(some(3, 5), some(4, 5)), F.linear(some(3, 5), some(4, 5)))


# more columns than are packed at a time, on either side
@needs_cpp
@pytest.mark.parametrize(("out", "width"), [(40, 1500), (1500, 40), (700, 700)])
def test_outer_gives_the_same_bits_on_any_number_of_threads(out, width):
    g = torch.Generator().manual_seed(0)
    grad, x = torch.randn(300, out, generator=g), torch.randn(300, width, generator=g)
    kept, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found.append((torch.zeros(out, width), torch.zeros(out)))
            add_outer(grad, x, *found[-1])
    finally:
        torch.set_num_threads(kept)
    assert all(torch.equal(a, b) for other in found[1:] for a, b in zip(found[0], other))


@needs_cpp
@pytest.mark.parametrize("spread", [1.0, 30.0])
def test_gelu_far_from_zero(spread):
    h = torch.linspace(-spread, spread, 4096).view(64, 64)
    one, nothing = torch.eye(64), torch.zeros(64)
    out, _ = feed_forward(h, one, nothing, one, nothing, torch.zeros_like(h), keep=False)
    dx, _, db1, dw2, _ = feed_forward_backward(torch.ones_like(h), h, h, one, one, 64)
    x = h.double().requires_grad_()
    want = torch.nn.functional.gelu(x)
    (want_slope,) = torch.autograd.grad(want.sum(), x)
    torch.testing.assert_close(out.double(), want, rtol=2e-6, atol=4e-7)
    torch.testing.assert_close(dx.double(), want_slope, rtol=1e-6, atol=6e-7)
    torch.testing.assert_close(dw2[0].double(), want.sum(0), rtol=2e-6, atol=3e-5)  # the GELU again, in the backward
    torch.testing.assert_close(db1.double(), want_slope.sum(0), rtol=2e-6, atol=3e-5)
    assert h.abs().max() < 20 or (out[0, 0] == 0 or abs(out[0, 0]) < 1e-6) and out[-1, -1] == h[-1, -1]


# rows and widths that fill no tile, and more rows than go through both layers at a time
@needs_cpp
@pytest.mark.parametrize(("n", "width", "hidden"), [(1, 1, 1), (7, 33, 70), (101, 40, 17), (250, 96, 128)])
def test_linear_and_feed_forward(n, width, hidden):
    g = torch.Generator().manual_seed(n)

    def some(*shape):
        return torch.randn(*shape, generator=g)

    close = partial(torch.testing.assert_close, rtol=1e-4, atol=2e-5)
    x, y, w1, b1 = some(n, width), some(n, width), some(hidden, width), some(hidden)
    w2, b2, grad = some(width, hidden) / hidden, some(width), some(n, width)
    h = block_linear(x, w1, b1)
    close(h.double(), x.double() @ w1.double().T + b1)
    close(block_linear(h, w2, b2, y).double(), h.double() @ w2.double().T + b2 + y)
    close(block_linear_backward(grad, w2).double(), grad.double() @ w2.double())

    double = [t.double().requires_grad_() for t in (x, w1, b1, w2, b2)]
    want_h = double[0] @ double[1].T + double[2]
    want = torch.nn.functional.gelu(want_h) @ double[3].T + double[4] + y
    found = torch.autograd.grad(want, double, grad.double())
    out, kept = feed_forward(x, w1, b1, w2, b2, y, keep=True)
    close(kept.double(), want_h)
    close(out.double(), want)
    unkept, nothing = feed_forward(x, w1, b1, w2, b2, y, keep=False)
    assert torch.equal(out, unkept)
    assert not nothing.numel()
    for portion in (64, 1000):
        for got, w in zip(feed_forward_backward(grad, x, kept, w1, w2, portion), found):
            close(got.double(), w, atol=1e-4)


@needs_cpp
def test_linear_refuses_other_shapes():
    x, w, b, nothing = torch.randn(9, 4), torch.randn(5, 4), torch.randn(5), torch.empty(0, 0)
    cpp = torch.ops.vjepa_fast_cpp
    for call in (
        lambda: cpp.linear(x, w, b, nothing, torch.empty(9, 4)),
        lambda: cpp.linear(x, w, b[:4], nothing, torch.empty(9, 5)),
        lambda: cpp.linear(x, w, b, torch.empty(8, 5), torch.empty(9, 5)),
        lambda: cpp.linear(x, torch.randn(4, 5).t(), b, nothing, torch.empty(9, 5)),
        lambda: cpp.linear(x, w, torch.randn(10)[::2], nothing, torch.empty(9, 5)),
        lambda: cpp.linear(torch.randn(4, 9).t(), w, b, nothing, torch.empty(9, 5)),
        lambda: cpp.linear_backward(x, w, torch.empty(9, 4)),
        lambda: cpp.feed_forward(x, w, b, w, b, x, nothing, torch.empty(9, 4)),
    ):
        with pytest.raises(RuntimeError, match="linear"):
            call()


# widths that fill no tile, more rows than are packed at a time, both ways to share the work
@pytest.mark.parametrize(
    ("n", "out", "width"), [(0, 5, 4), (1, 1, 1), (7, 5, 33), (300, 70, 41), (513, 8, 1100), (600, 96, 32)]
)
def test_outer_adds_the_gradient_of_weight_and_bias(n, out, width):
    g = torch.Generator().manual_seed(n)
    grad, x = (torch.randn(n, m, generator=g) for m in (out, width))
    dw, db = torch.full((out, width), 2.0), torch.full((out,), 3.0)
    add_outer(grad, x, dw, db)
    torch.testing.assert_close(dw.double(), grad.double().T @ x.double() + 2, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(db.double(), grad.double().sum(0) + 3, rtol=1e-5, atol=1e-4)


@needs_cpp
@pytest.mark.parametrize(("out", "width"), [(5, 0), (0, 5), (0, 0)])
def test_outer_of_nothing(out, width):
    grad, x, dw, db = torch.ones(300, out), torch.ones(300, width), torch.zeros(out, width), torch.zeros(out)
    torch.ops.vjepa_fast_cpp.add_outer(grad, x, dw, db)
    assert (db == 300).all()


@needs_cpp
def test_outer_without_the_extension(monkeypatch):
    grad, x = torch.randn(2, 9, 5), torch.randn(2, 9, 4)
    got, want = ((torch.zeros(5, 4), torch.zeros(5)) for _ in range(2))
    add_outer(grad, x, *got)
    monkeypatch.setattr(_cpp, "LOADED", False)
    add_outer(grad, x, *want)
    torch.testing.assert_close(got, want)


@needs_cpp
def test_outer_refuses_other_shapes():
    grad, x = torch.randn(9, 5), torch.randn(9, 4)
    for dw, db in (
        (torch.zeros(4, 5), torch.zeros(5)),
        (torch.zeros(5, 4), torch.zeros(4)),
        (torch.zeros(4, 5).t(), torch.zeros(5)),
    ):
        with pytest.raises(RuntimeError, match="add_outer"):
            add_outer(grad, x, dw, db)


@needs_cpp
def test_feed_forward_gives_the_same_bits_on_any_number_of_threads():
    x, w1, b1, w2, b2 = some(180, 64), some(144, 64, seed=1), some(144, seed=2), some(64, 144, seed=3), some(64, seed=4)
    kept, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            out, hidden = feed_forward(x, w1, b1, w2, b2, x, keep=True)
            found.append((out, hidden, *feed_forward_backward(x, x, hidden, w1, w2, 100)))
    finally:
        torch.set_num_threads(kept)
    assert all(torch.equal(a, b) for other in found[1:] for a, b in zip(found[0], other))
