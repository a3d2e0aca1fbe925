"""The block written out by hand against the plain one: values, gradients, bits, memory."""

from concurrent.futures import ThreadPoolExecutor
from functools import partial

import pytest
import torch

from vjepa_fast import ops
from vjepa_fast.layers import cpu_block
from vjepa_fast.layers.block import Block, run_block
from vjepa_fast.models import rope
from vjepa_fast.ops import _cpp, attention, linear
from vjepa_fast.ops.linear import feed_forward_backward

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
    monkeypatch.setattr(cpu_block, "feed_forward_backward", partial(feed_forward_backward, portion=rows))
    for n, (e, o) in enumerate(zip(exact, run(block, x, table, [10, 13], grad))):
        assert (o - e).abs().max() <= 1e-5 * e.abs().max(), f"output {n}"


def test_without_gradient_it_gives_the_same():
    block, x, table, grad = make()
    with torch.no_grad():
        out = block(x, table, [10, 13])
    torch.testing.assert_close(out.double(), run(block, x, table, [10, 13], grad)[0], rtol=1e-5, atol=1e-5)


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
    for made_once in (attention._nowhere, attention._lengths, linear._nothing):
        made_once.cache_clear()
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
