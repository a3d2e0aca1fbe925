"""The block written out by hand against the plain one: values, gradients, bits, memory."""
import pytest
import torch

from vjepa_fast import ops
from vjepa_fast.models import fused_block, rope
from vjepa_fast.models.attention import Block, run_block
from vjepa_fast.ops import _cpp
from vjepa_fast.ops.linear import add_outer, has_product

pytestmark = pytest.mark.skipif(not _cpp.LOADED or not has_product(), reason=_cpp.REASON or "no oneDNN")
GRID = (4, 5, 5)


def make(width=48, heads=4, batch=2, tokens=23, variant="v2.1", positions=True, seed=0):
    g = torch.Generator().manual_seed(seed)
    block = Block(width, heads, 4.0, False, True)
    with torch.no_grad():
        for p in block.parameters():
            p.copy_(torch.randn(p.shape, generator=g) * (0.3 if p.ndim > 1 else 0.5) + (p.ndim == 1))
    x = 2 * torch.randn(batch, tokens, width, generator=g) + 0.3
    idx = torch.stack([torch.randperm(100, generator=g)[:tokens] for _ in range(batch)])
    table = rope.rope_table(GRID, width // heads, variant, 16, torch.float32, x.device, False)[idx]
    return block, x, table if positions else None, torch.randn(x.shape, generator=g)


def run(block, x, table, lengths, grad, dtype=torch.float32, plain=False):
    """Output and gradients of x and all parameters, as float64; ``plain``: the block as PyTorch computes it."""
    block = block.to(dtype)
    x = x.to(dtype).requires_grad_()
    with ops.use_backend("eager" if plain else "auto"):
        assert fused_block.serves(x, table) is not plain
        out = block(x, table, lengths)
        grads = torch.autograd.grad(out, [x, *block.parameters()], grad.to(dtype))
    block.float()
    return [t.detach().double() for t in (out, *grads)]


@pytest.mark.parametrize("change, lengths", [
    ({}, None), ({}, [10, 13]), ({}, [1, 22]), ({"variant": "v2"}, [20, 3]), ({"positions": False}, [10, 13]),
    ({"tokens": 1}, None), ({"batch": 1, "tokens": 100}, [67, 33]), ({"width": 130, "heads": 1}, [11, 12]),
    ({"width": 96, "heads": 8}, [5, 5, 13]), ({"width": 192, "heads": 3, "tokens": 70}, [64, 6]), ({}, [0, 23]),
])
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
    monkeypatch.setattr(fused_block, "_PORTION", rows)
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
    kept, found = torch.get_num_threads(), []
    cpp = torch.ops.vjepa_fast_cpp
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            dh, a = torch.ones_like(hidden), torch.empty_like(hidden)
            cpp.attention(qkv, nowhere, lengths, 4, out, lse)
            cpp.attention_backward(grad, qkv, nowhere, lengths, 4, out, lse, dqkv)
            cpp.gelu_backward(hidden, dh, a)
            dw, db = torch.ones(64, 144), torch.ones(64)
            cpp.add_outer(hidden, qkv.view(180, 144), dw, db)
            dw_2, db_2 = torch.ones(144, 64), torch.ones(144)
            cpp.add_outer(qkv.view(180, 144), hidden, dw_2, db_2)
            found.append([t.clone() for t in (out, lse, dqkv, dh, a, dw, db, dw_2, db_2)])
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


def test_who_is_served():
    x = torch.zeros(1, 2, 12)
    assert fused_block.serves(x, None)
    assert not fused_block.serves(x.double(), None)
    assert not fused_block.serves(x.bfloat16(), None)
    assert not fused_block.serves(x[:, :0], None)
    assert not fused_block.serves(x, torch.zeros(2, 6, dtype=torch.complex64))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert not fused_block.serves(x, None)
    with ops.use_backend("eager"):
        assert not fused_block.serves(x, None)


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
    assert fused_block.fits(block)
    seen = []
    handle = block.mlp.register_forward_hook(lambda *_: seen.append("mlp"))
    block(x, table)
    handle.remove()
    block(x, table)
    assert seen == ["mlp"] and fused_block.fits(block)


@pytest.mark.parametrize("lengths", [[10, 12], [24], [-1, 24]])
def test_lengths_must_add_up(lengths):
    block, x, table, _ = make()
    with pytest.raises(RuntimeError, match="length"):
        block(x, table, lengths)


@pytest.mark.parametrize("spread", [1.0, 30.0])
def test_gelu_far_from_zero(spread):
    h = torch.linspace(-spread, spread, 4096).view(64, 64)
    a, grad = torch.empty_like(h), torch.ones_like(h)
    torch.ops.vjepa_fast_cpp.gelu_backward(h, grad, a)
    x = h.double().requires_grad_()
    want = torch.nn.functional.gelu(x)
    (slope,) = torch.autograd.grad(want.sum(), x)
    torch.testing.assert_close(a.double(), want, rtol=2e-6, atol=4e-7)
    torch.testing.assert_close(grad.double(), slope, rtol=1e-6, atol=6e-7)
    assert h.abs().max() < 20 or (a[0, 0] == 0 or abs(a[0, 0]) < 1e-6) and a[-1, -1] == h[-1, -1]


# widths that fill no tile, more rows than are packed at a time, both ways to share the work
@pytest.mark.parametrize("n, out, width", [(1, 1, 1), (7, 5, 33), (300, 70, 41), (513, 8, 1100), (600, 96, 32)])
def test_outer_adds_the_gradient_of_weight_and_bias(n, out, width):
    g = torch.Generator().manual_seed(n)
    grad, x = (torch.randn(n, m, generator=g) for m in (out, width))
    dw, db = torch.full((out, width), 2.0), torch.full((out,), 3.0)
    add_outer(grad, x, dw, db)
    torch.testing.assert_close(dw.double(), grad.double().T @ x.double() + 2, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(db.double(), grad.double().sum(0) + 3, rtol=1e-5, atol=1e-4)


def test_outer_without_the_extension(monkeypatch):
    grad, x = torch.randn(2, 9, 5), torch.randn(2, 9, 4)
    got, want = ((torch.zeros(5, 4), torch.zeros(5)) for _ in range(2))
    add_outer(grad, x, *got)
    monkeypatch.setattr(_cpp, "LOADED", False)
    add_outer(grad, x, *want)
    torch.testing.assert_close(got, want)


def test_outer_refuses_other_shapes():
    grad, x = torch.randn(9, 5), torch.randn(9, 4)
    for dw, db in ((torch.zeros(4, 5), torch.zeros(5)), (torch.zeros(5, 4), torch.zeros(4))):
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
