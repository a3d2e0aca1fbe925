"""The block written out by hand against the plain one: values, gradients, bits, memory."""

from concurrent.futures import ThreadPoolExecutor
from functools import partial

import pytest
import torch

from vjepa_fast import ops
from vjepa_fast.layers import cpu_block
from vjepa_fast.layers.block import Block, run_block
from vjepa_fast.models import rope
from vjepa_fast.ops import _cpp
from vjepa_fast.ops.linear import add_outer

pytestmark = pytest.mark.skipif(not _cpp.LOADED, reason=_cpp.REASON)
GRID = (4, 5, 5)


def make(width=48, heads=4, batch=2, tokens=23, variant="v2.1", positions=True, seed=0):
    g = torch.Generator().manual_seed(seed)
    block = Block(width, heads, 4.0, False, True)
    with torch.no_grad():
        for p in block.parameters():
            p.copy_(torch.randn(p.shape, generator=g) * (0.3 if p.ndim > 1 else 0.5) + (p.ndim == 1))
    x = 2 * torch.randn(batch, tokens, width, generator=g) + 0.3
    idx = torch.stack([torch.randperm(100, generator=g)[:tokens] for _ in range(batch)])
    table = None
    if positions:
        table = rope.rope_table(GRID, width // heads, variant, 16, torch.float32, x.device, False)[idx]
    return block, x, table, torch.randn(x.shape, generator=g)


def run(block, x, table, lengths, grad, dtype=torch.float32, plain=False):
    """Output and gradients of x and all parameters, as float64; ``plain``: the block as PyTorch computes it."""
    block = block.to(dtype)
    x = x.to(dtype).requires_grad_()
    with ops.use_backend("eager" if plain else "auto"):
        assert cpu_block.supports(x, table) is not plain
        out = block(x, table, lengths)
        grads = torch.autograd.grad(out, [x, *block.parameters()], grad.to(dtype))
    block.float()
    return [t.detach().double() for t in (out, *grads)]


@pytest.mark.parametrize(
    ("change", "lengths"),
    [
        ({}, None),
        ({}, [10, 13]),
        ({}, [1, 22]),
        ({"variant": "v2"}, [20, 3]),
        ({"positions": False}, [10, 13]),
        ({"tokens": 1}, None),
        ({"batch": 1, "tokens": 100}, [67, 33]),
        ({"width": 130, "heads": 1}, [11, 12]),
        ({"width": 96, "heads": 8}, [5, 5, 13]),
        ({"width": 192, "heads": 3, "tokens": 70}, [64, 6]),
        ({}, [0, 23]),
        ({"width": 57, "heads": 3, "positions": False}, [10, 13]),
    ],
)
def test_values_and_gradients(change, lengths):
    block, x, table, grad = make(**change)
    exact = run(block, x, table, lengths, grad, torch.float64, plain=True)
    eager = run(block, x, table, lengths, grad, plain=True)
    ours = run(block, x, table, lengths, grad)
    for n, (e, p, o) in enumerate(zip(exact, eager, ours)):
        bound = 2 * (p - e).abs().max() + 1e-5 * e.abs().max()
        assert (o - e).abs().max() <= bound, f"output {n}"
    again = run(block, x, table, lengths, grad)
    assert all(torch.equal(a, b) for a, b in zip(ours, again))


@pytest.mark.parametrize("rows", [1, 7, 23, 45])
def test_portions_of_rows(rows, monkeypatch):
    block, x, table, grad = make()  # 46 rows
    exact = run(block, x, table, [10, 13], grad, torch.float64, plain=True)
    monkeypatch.setattr(cpu_block, "_PORTION", rows)
    for n, (e, o) in enumerate(zip(exact, run(block, x, table, [10, 13], grad))):
        assert (o - e).abs().max() <= 1e-5 * e.abs().max(), f"output {n}"


def test_without_gradient_it_gives_the_same():
    block, x, table, grad = make()
    with torch.no_grad():
        out = block(x, table, [10, 13])
    torch.testing.assert_close(out.double(), run(block, x, table, [10, 13], grad)[0], rtol=1e-5, atol=1e-5)


def test_kernels_give_the_same_bits_on_any_number_of_threads():
    g = torch.Generator().manual_seed(0)
    qkv, out = torch.randn(2, 90, 144, generator=g), torch.empty(2, 90, 48)
    lse, dqkv, grad = torch.empty(2, 4, 90), torch.empty(2, 90, 144), torch.randn(2, 90, 48, generator=g)
    hidden = torch.randn(180, 64, generator=g)
    nowhere, lengths = torch.empty(0), torch.tensor([40, 50])
    w1, b1, b2 = torch.randn(144, 64, generator=g), torch.randn(144, generator=g), torch.randn(64, generator=g)
    kept, found = torch.get_num_threads(), []
    cpp = torch.ops.vjepa_fast_cpp
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            cpp.attention(qkv, nowhere, lengths, 4, out, lse)
            cpp.attention_backward(grad, qkv, nowhere, lengths, 4, out, lse, dqkv)
            kept_h, out_2 = torch.empty(180, 144), torch.empty_like(hidden)
            cpp.feed_forward(hidden, w1, b1, w1.t().contiguous(), b2, hidden, kept_h, out_2)
            dx, dw1, db1 = torch.empty_like(hidden), torch.zeros_like(w1), torch.zeros(144)
            dw2, db2 = torch.zeros(64, 144), torch.zeros(64)
            cpp.feed_forward_backward(hidden, hidden, kept_h, w1, w1.t().contiguous(), 100, dx, dw1, db1, dw2, db2)
            dw, db = torch.ones(64, 144), torch.ones(64)
            cpp.add_outer(hidden, qkv.view(180, 144), dw, db)
            dw_2, db_2 = torch.ones(144, 64), torch.ones(144)
            cpp.add_outer(qkv.view(180, 144), hidden, dw_2, db_2)
            every = out, lse, dqkv, kept_h, out_2, dx, dw1, db1, dw2, db2, dw, db, dw_2, db_2
            found.append([t.clone() for t in every])
    finally:
        torch.set_num_threads(kept)
    assert all(torch.equal(a, b) for other in found[1:] for a, b in zip(found[0], other))


# more columns than are packed at a time, on either side
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


def test_it_keeps_little():
    block, x, table, _ = make(width=96, heads=4, tokens=60)
    kept: dict[int, int] = {}

    def count(t):
        kept[t.untyped_storage().data_ptr()] = t.numel()
        return t

    weights = {p.untyped_storage().data_ptr() for p in block.parameters()} | {table.untyped_storage().data_ptr()}
    numbers = []
    for backend in ("eager", "auto"):
        kept.clear()
        with ops.use_backend(backend), torch.autograd.graph.saved_tensors_hooks(count, lambda t: t):
            block(x.clone().requires_grad_(), table, [20, 40])
        numbers.append(sum(n for p, n in kept.items() if p not in weights) / x.numel())
    plain, ours = numbers
    assert ours < 10.2 and plain > 14


def test_recomputed_under_checkpointing():
    block, x, table, grad = make()
    want = run(block, x, table, [10, 13], grad)
    x = x.requires_grad_()
    out = run_block(block, x, table, True, [10, 13])
    got = torch.autograd.grad(out, [x, *block.parameters()], grad)
    assert all(torch.equal(a.double(), b) for a, b in zip((out, *got), want))


def test_a_second_derivative_is_refused():
    block, x, table, grad = make()
    out = block(x.requires_grad_(), table, None)
    (dx,) = torch.autograd.grad(out, x, grad, create_graph=True)
    with pytest.raises(RuntimeError, match="does not require grad"):
        dx.sum().backward()


def test_what_it_supports():
    x = torch.zeros(1, 2, 12)
    assert cpu_block.supports(x, None)
    assert not cpu_block.supports(x.double(), None)
    assert not cpu_block.supports(x.bfloat16(), None)
    assert not cpu_block.supports(x[:, :0], None)
    assert not cpu_block.supports(x, torch.zeros(2, 6, dtype=torch.complex64))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert not cpu_block.supports(x, None)
    with ops.use_backend("eager"):
        assert not cpu_block.supports(x, None)


def test_weights_that_are_not_contiguous():
    block, x, table, grad = make()
    with torch.no_grad():
        for layer in (block.attn.qkv, block.attn.proj, block.mlp.fc1, block.mlp.fc2):
            layer.weight = torch.nn.Parameter(layer.weight.t().contiguous().t())
            layer.bias = torch.nn.Parameter(layer.bias.repeat_interleave(2)[::2])
        for norm in (block.norm1, block.norm2):
            norm.weight = torch.nn.Parameter(norm.weight.repeat_interleave(2)[::2])
    want = run(block, x, table, [10, 13], grad, torch.float64, plain=True)
    for n, (e, o) in enumerate(zip(want, run(block, x, table, [10, 13], grad))):
        assert (o - e).abs().max() <= 1e-5 * e.abs().max(), f"output {n}"


def test_first_used_in_inference_mode():
    """What is made once and kept must do for training too."""
    block, x, _, grad = make(tokens=17, positions=False)
    cpu_block._nowhere.cache_clear(), cpu_block._lengths.cache_clear(), cpu_block._nothing_kept.cache_clear()
    with torch.inference_mode(), torch.device("meta"):
        block(x, None, [8, 9])
    run(block, x, None, [8, 9], grad)
    with torch.no_grad():
        block(x, None, [8, 9])


def test_two_threads_at_once():
    blocks = [make(seed=seed, tokens=40 + seed) for seed in range(2)]
    want = [run(block, x, table, None, grad) for block, x, table, grad in blocks]
    with ThreadPoolExecutor(2) as pool:
        for _ in range(10):
            for w, got in zip(want, pool.map(lambda b: run(*b[:3], None, b[3]), blocks)):
                assert all(torch.equal(a, b) for a, b in zip(w, got))


def test_another_attention_is_called():
    class Nothing(type(make()[0].attn)):
        def forward(self, x, *_):
            return torch.zeros_like(x)

    block, x, table, _ = make()
    block.attn = Nothing(48, 4)
    assert torch.equal(block(x, table), x + block.mlp(block.norm2(x)))


class Adapter(torch.nn.Linear):
    """As low-rank adapters do it: a linear layer and something beside it."""

    def forward(self, x):
        return super().forward(x) + 1


@pytest.mark.parametrize("path", ["attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2"])
def test_replaced_layers_are_called(path):
    block, x, table, _ = make()
    old = block.get_submodule(path)
    new = Adapter(old.in_features, old.out_features)
    new.load_state_dict(old.state_dict())
    if path == "mlp.fc1":
        new.gelu = lambda x: torch.nn.functional.gelu(new(x))
    block.set_submodule(path, new)
    with ops.use_backend("eager"):
        want = block(x, table)
    assert (block(x, table) - want).abs().max() <= 1e-5 * want.abs().max()


def test_hooks_are_called():
    block, x, table, _ = make()
    assert cpu_block.fits(block)
    seen = []
    handle = block.mlp.register_forward_hook(lambda *_: seen.append("mlp"))
    block(x, table)
    handle.remove()
    block(x, table)
    assert seen == ["mlp"] and cpu_block.fits(block)


@pytest.mark.parametrize("lengths", [[10, 12], [24], [-1, 24]])
def test_lengths_must_add_up(lengths):
    block, x, table, _ = make()
    with pytest.raises(RuntimeError, match="length"):
        block(x, table, lengths)


@pytest.mark.parametrize("spread", [1.0, 30.0])
def test_gelu_far_from_zero(spread):
    h = torch.linspace(-spread, spread, 4096).view(64, 64)
    one, nothing, out, dx = torch.eye(64), torch.zeros(64), torch.empty_like(h), torch.empty_like(h)
    dw1, db1, dw2, db2 = torch.zeros(64, 64), torch.zeros(64), torch.zeros(64, 64), torch.zeros(64)
    torch.ops.vjepa_fast_cpp.feed_forward(h, one, nothing, one, nothing, torch.zeros_like(h), torch.empty(0, 0), out)
    torch.ops.vjepa_fast_cpp.feed_forward_backward(torch.ones_like(h), h, h, one, one, 64, dx, dw1, db1, dw2, db2)
    x = h.double().requires_grad_()
    want = torch.nn.functional.gelu(x)
    (want_slope,) = torch.autograd.grad(want.sum(), x)
    torch.testing.assert_close(out.double(), want, rtol=2e-6, atol=4e-7)
    torch.testing.assert_close(dx.double(), want_slope, rtol=1e-6, atol=6e-7)
    torch.testing.assert_close(dw2[0].double(), want.sum(0), rtol=2e-6, atol=3e-5)  # the GELU again, in the backward
    torch.testing.assert_close(db1.double(), want_slope.sum(0), rtol=2e-6, atol=3e-5)
    assert h.abs().max() < 20 or (out[0, 0] == 0 or abs(out[0, 0]) < 1e-6) and out[-1, -1] == h[-1, -1]


# rows and widths that fill no tile, and more rows than go through both layers at a time
@pytest.mark.parametrize(("n", "width", "hidden"), [(1, 1, 1), (7, 33, 70), (101, 40, 17), (250, 96, 128)])
def test_linear_and_feed_forward(n, width, hidden):
    g = torch.Generator().manual_seed(n)

    def some(*shape):
        return torch.randn(*shape, generator=g)

    cpp, close = torch.ops.vjepa_fast_cpp, partial(torch.testing.assert_close, rtol=1e-4, atol=2e-5)
    x, y, w1, b1 = some(n, width), some(n, width), some(hidden, width), some(hidden)
    w2, b2, grad = some(width, hidden) / hidden, some(width), some(n, width)
    h, out = torch.full((n, hidden), 9.0), torch.full((n, width), 9.0)
    cpp.linear(x, w1, b1, torch.empty(0, 0), h)
    close(h.double(), x.double() @ w1.double().T + b1)
    cpp.linear(h, w2, b2, y, out)
    close(out.double(), h.double() @ w2.double().T + b2 + y)
    cpp.linear_backward(grad, w2, h)
    close(h.double(), grad.double() @ w2.double())

    double = [t.double().requires_grad_() for t in (x, w1, b1, w2, b2)]
    want_h = double[0] @ double[1].T + double[2]
    want = torch.nn.functional.gelu(want_h) @ double[3].T + double[4] + y
    found = torch.autograd.grad(want, double, grad.double())
    kept, unkept = torch.empty(n, hidden), torch.empty(n, width)
    cpp.feed_forward(x, w1, b1, w2, b2, y, kept, out)
    cpp.feed_forward(x, w1, b1, w2, b2, y, torch.empty(0, 0), unkept)
    close(kept.double(), want_h), close(out.double(), want)
    assert torch.equal(out, unkept)
    for portion in (64, 1000):
        dx, dw1, db1 = torch.empty(n, width), torch.ones(hidden, width), torch.ones(hidden)
        dw2, db2 = torch.ones(width, hidden), torch.ones(width)
        cpp.feed_forward_backward(grad, x, kept, w1, w2, portion, dx, dw1, db1, dw2, db2)
        for got, w, before in zip((dx, dw1, db1, dw2, db2), found, (0, 1, 1, 1, 1)):
            close(got.double(), w + before, atol=1e-4)


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


@pytest.mark.parametrize(("out", "width"), [(5, 0), (0, 5), (0, 0)])
def test_outer_of_nothing(out, width):
    grad, x, dw, db = torch.ones(300, out), torch.ones(300, width), torch.zeros(out, width), torch.zeros(out)
    torch.ops.vjepa_fast_cpp.add_outer(grad, x, dw, db)
    assert (db == 300).all()


def test_outer_without_the_extension(monkeypatch):
    grad, x = torch.randn(2, 9, 5), torch.randn(2, 9, 4)
    got, want = ((torch.zeros(5, 4), torch.zeros(5)) for _ in range(2))
    add_outer(grad, x, *got)
    monkeypatch.setattr(_cpp, "LOADED", False)
    add_outer(grad, x, *want)
    torch.testing.assert_close(got, want)


def test_outer_refuses_other_shapes():
    grad, x = torch.randn(9, 5), torch.randn(9, 4)
    for dw, db in (
        (torch.zeros(4, 5), torch.zeros(5)),
        (torch.zeros(5, 4), torch.zeros(4)),
        (torch.zeros(4, 5).t(), torch.zeros(5)),
    ):
        with pytest.raises(RuntimeError, match="add_outer"):
            add_outer(grad, x, dw, db)


def test_attention_keeps_a_nan():
    """Of a key it reaches every token of its segment and head, and no other."""
    qkv = torch.randn(1, 50, 3 * 32)
    qkv[0, 7, 32] = float("nan")  # key, first of two heads
    out, lse = torch.empty(1, 50, 32), torch.empty(1, 2, 50)
    torch.ops.vjepa_fast_cpp.attention(qkv, torch.empty(0), torch.tensor([20, 30]), 2, out, lse)
    lost = torch.isnan(out)
    assert lost[0, :20, :16].all() and lost.sum() == 20 * 16


def test_attention_of_hopeless_scores():
    """Scores that are all -inf have no softmax: NaN, as in PyTorch, and not the mean of the padding."""
    qkv = torch.ones(1, 5, 3 * 4)
    qkv[0, :, :4], qkv[0, :, 4:8] = 1e30, -1e30
    out, lse = torch.empty(1, 5, 4), torch.empty(1, 1, 5)
    torch.ops.vjepa_fast_cpp.attention(qkv, torch.empty(0), torch.tensor([5]), 1, out, lse)
    assert out.isnan().all()


def test_an_odd_head_reads_no_neighbour():
    qkv = torch.randn(1, 6, 3 * 6)  # two heads of 3 channels
    qkv[0, :, 3:6] = float("nan")  # queries of the second
    out, lse = torch.empty(1, 6, 6), torch.empty(1, 2, 6)
    torch.ops.vjepa_fast_cpp.attention(qkv, torch.empty(0), torch.tensor([6]), 2, out, lse)
    assert out[..., :3].isfinite().all() and out[..., 3:].isnan().all()
