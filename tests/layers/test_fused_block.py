"""The blocks for a GPU, on a CPU by the eager code of their ops or by interpreted kernels, against the plain ones."""

import pytest
import torch
from torch import nn

from tests.ops.parity import DEVICE, KERNELS
from vjepa_fast import ops
from vjepa_fast.errors import ConfigError
from vjepa_fast.layers import fused_block
from vjepa_fast.layers.attention import DeviceSegments
from vjepa_fast.layers.block import Block, run_blocks, use_epilogues
from vjepa_fast.models import rope
from vjepa_fast.ops.gelu import quack_objections

GRID = (4, 5, 5)
BACKENDS = ["eager", *KERNELS[1:]]
WIDTH, HEADS, TOKENS = 48, 4, 23


def make(depth=2, levels=(0, 1), batch=1, seed=0):
    """Blocks, norms, tokens, positions and a gradient, of bfloat16 numbers."""
    g = torch.Generator().manual_seed(seed)
    blocks = nn.ModuleList(Block(WIDTH, HEADS, 4.0, False, True) for _ in range(depth))
    norms = nn.ModuleList(nn.LayerNorm(WIDTH, eps=1e-6) for _ in levels)
    with torch.no_grad():
        for p in (*blocks.parameters(), *norms.parameters()):
            p.copy_((torch.randn(p.shape, generator=g) * (0.2 if p.ndim > 1 else 0.5) + (p.ndim == 1)).bfloat16())
    x, grad = (torch.randn(batch, TOKENS, WIDTH * n, generator=g).bfloat16().float() for n in (1, len(levels)))
    idx = torch.randperm(100, generator=g)[:TOKENS]
    table = rope.rope_table(GRID, WIDTH // HEADS, "v2.1", 16, torch.float32, torch.device("cpu"), False)[idx]
    modules = nn.ModuleList([blocks, norms]).to(DEVICE)
    return modules, dict(zip(levels, norms)), 2 * x.to(DEVICE), table.to(DEVICE), grad.to(DEVICE)


def fused(blocks, norms, x, table, lengths, recompute=False):
    return fused_block.apply(blocks, norms, x, table, recompute, lengths)


def plain(blocks, norms, x, table, lengths, recompute=False):
    with ops.use_backend("eager"):
        return torch.cat(run_blocks(blocks, norms, x, table, recompute, lengths), -1)


def results(run, made, dtype, lengths, half, recompute=False):
    """Output and gradients of tokens and parameters, as float64; ``half``: under autocast to bfloat16."""
    modules, norms, x, table, grad = made
    modules.to(dtype)
    x = x.to(torch.bfloat16 if half else dtype).requires_grad_()
    with torch.autocast(x.device.type, torch.bfloat16, enabled=half):
        out = run(modules[0], norms, x, table, lengths, recompute)
    grads = torch.autograd.grad(out, [x, *modules.parameters()], grad.to(out.dtype))
    modules.float()
    assert out.dtype == x.dtype or not half or run is plain
    return [t.detach().double().cpu() for t in (out, *grads)]


def hold(ours, eager, exact, factor=2.0):
    """The error of every tensor, over all of its numbers: after a few blocks the largest one is a matter of luck."""
    for n, (o, p, e) in enumerate(zip(ours, eager, exact)):
        bound = factor * (p - e).norm() + 1e-5 * e.norm()
        assert (o - e).norm() <= bound, f"output {n}: {(o - e).norm():.3g} over {bound:.3g}"


@pytest.mark.parametrize("lengths", [None, [10, 13]])
def test_in_float32_it_is_the_plain_block(lengths):
    """By the eager code of the ops: what is tested is how they are put together."""
    made = make(batch=2)
    exact = results(plain, made, torch.float64, lengths, half=False)
    eager = results(plain, made, torch.float32, lengths, half=False)
    with ops.use_backend("eager"):
        hold(results(fused, made, torch.float32, lengths, half=False), eager, exact, factor=4.0)


@pytest.mark.parametrize("backend", BACKENDS)
def test_under_autocast(backend):
    made = make()
    exact = results(plain, made, torch.float64, None, half=False)
    eager = results(plain, made, torch.float32, None, half=True)
    for block, how in zip(made[0][0], ("triton", "torch")):
        block.epilogues = how
    with ops.use_backend(backend):
        ours = results(fused, made, torch.float32, None, half=True)
        again = results(fused, made, torch.float32, None, half=True)
    hold(ours, eager, exact)
    assert all(torch.equal(a, b) for a, b in zip(ours, again))


def test_segments_on_the_device():
    """As plain lengths, filler at the end with segments of its own."""
    made = make()
    sizes = torch.tensor([10, 9, 4, 0], device=DEVICE)
    exact = results(plain, made, torch.float64, [10, 9, 4], half=False)
    eager = results(plain, made, torch.float32, [10, 9, 4], half=True)
    with ops.use_backend("eager"):
        hold(results(fused, made, torch.float32, DeviceSegments(sizes, 12), half=True), eager, exact)


def test_recomputed_under_checkpointing():
    made = make()
    exact = results(plain, made, torch.float64, None, half=False)
    eager = results(plain, made, torch.float32, None, half=True)
    with ops.use_backend("eager"):
        hold(results(fused, made, torch.float32, None, half=True, recompute=True), eager, exact)


@pytest.mark.parametrize("backend", BACKENDS)
def test_without_gradient_it_gives_the_same(backend):
    modules, norms, x, table, _ = make()
    with ops.use_backend(backend), torch.autocast(DEVICE, torch.bfloat16):
        want = fused(modules[0], norms, x, table, None)
        with torch.no_grad():
            got = fused(modules[0], norms, x, table, None)
    # the kernel does not round what comes before the GELU where it does not keep it
    torch.testing.assert_close(got, want.detach(), rtol=0, atol=0 if backend == "eager" else 0.05)


def kept(run):
    """Bytes that autograd keeps for the backward of ``run()``, weights of the model and positions not counted."""
    modules, norms, x, table, _ = made = make(depth=4, levels=(1, 3))
    known = {p.untyped_storage().data_ptr() for p in (*modules.parameters(), table)}
    found = {}

    def count(t):
        weight = t.shape in {p.shape for p in modules.parameters()}  # or its copy in 16 bits
        if not weight and t.untyped_storage().data_ptr() not in known:
            found[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autocast(DEVICE, torch.bfloat16), torch.autograd.graph.saved_tensors_hooks(count, lambda t: t):
        out = run(*made)
    assert out.requires_grad
    return sum(found.values())


def test_what_is_kept():
    """By block and token 10 E numbers of 16 bits and, of 32, two of each LayerNorm and one of each head; by level 2."""

    def run(modules, norms, x, table, _):
        return fused(modules[0], norms, x.bfloat16().requires_grad_(), None, None)

    with ops.use_backend("eager"):
        found = kept(run)
    per_token = 4 * (2 * 10 * WIDTH + 4 * 4 + 4 * HEADS) + 2 * WIDTH + 2 * 8
    assert found / TOKENS == per_token


@pytest.fixture
def calls(monkeypatch):
    """Where ``run_blocks`` takes the fused path: what it was given."""
    seen, real = [], fused_block.apply
    monkeypatch.setattr(fused_block, "apply", lambda *args: seen.append(args) or real(*args))
    return seen


def through(made, x=None, half=True):
    modules, norms, tokens, table, _ = made
    with torch.no_grad(), torch.autocast(DEVICE, torch.bfloat16, enabled=half):
        return run_blocks(modules[0], norms, tokens if x is None else x, table, False)


def touch(modules, what):
    block = modules[0][1]
    if what == "a hook":
        block.register_forward_hook(lambda *_: None)
    elif what == "8 bits":
        block.mlp.fc1.fp8 = True
    elif what == "switched off":
        block.epilogues = False
    elif what == "SwiGLU":
        modules[0][1] = Block(WIDTH, HEADS, 4.0, True, True)
    elif what == "an adapter":
        block.attn.qkv = nn.Sequential(block.attn.qkv)


@pytest.mark.parametrize("what", ["a hook", "8 bits", "switched off", "SwiGLU", "an adapter"])
def test_what_is_left_to_plain_blocks(what, calls, monkeypatch):
    monkeypatch.setattr("vjepa_fast.layers.fp8.linear", nn.functional.linear)
    monkeypatch.setattr(fused_block, "supports", lambda *_: True)
    made = make(depth=2, levels=(0, 1))
    with ops.use_backend("eager"):
        assert len(through(made)) == 1 and len(calls) == 1
        touch(made[0], what)
        assert len(through(made)) == 2 and len(calls) == 1


def test_what_tokens_are_left_to_plain_blocks():
    _, norms, x, *_ = make(depth=1, levels=(0,))
    with ops.use_backend("triton"):
        assert fused_block.supports(x.bfloat16(), norms)
        assert not fused_block.supports(x, norms)
        assert not fused_block.supports(x[:, :0].bfloat16(), norms)
        with torch.autocast(DEVICE, torch.bfloat16):
            assert fused_block.supports(x, norms)
        norms[0].register_forward_hook(lambda *_: None)
        assert not fused_block.supports(x.bfloat16(), norms)
    for backend in ("eager", "auto"):
        with ops.use_backend(backend):
            assert fused_block.supports(x.bfloat16(), {}) == (backend == "auto" and DEVICE == "cuda")


def test_compiled():
    modules, norms, x, table, grad = make(depth=1, levels=(0,))

    def run(x):
        out = fused(modules[0], norms, x, table, None)
        return out, *torch.autograd.grad(out, [x, *modules.parameters()], grad.to(out.dtype))

    x = x.bfloat16().requires_grad_()
    with ops.use_backend("eager"):
        want = run(x)
        got = torch.compile(run, backend="aot_eager")(x)
    assert all(torch.equal(a, b) for a, b in zip(got, want))


@pytest.mark.parametrize(
    ("how", "device", "dtype", "silu", "text"),
    [
        ("triton", "cpu", torch.bfloat16, False, "it needs CUDA, the run is on cpu; use auto"),
        ("torch", "cuda", torch.float32, False, "it needs runtime.dtype=bfloat16, got float32; use auto"),
        ("triton", "cuda", torch.bfloat16, True, "feed-forward with GELU .*model.use_silu"),
        ("quack", "cpu", torch.float32, False, "needs CUDA.*float32; .*quack-kernels"),
    ],
)
def test_a_choice_that_cannot_be_had_is_refused_with_all_reasons(how, device, dtype, silu, text):
    if how == "quack" and not quack_objections():
        pytest.skip("quack-kernels runs here")
    block = Block(WIDTH, HEADS, 4.0, silu, True)
    with pytest.raises(ConfigError, match=f"runtime.epilogues: {how} is not supported here: .*{text}"):
        use_epilogues(how, torch.device(device), dtype, block)
    for choice in (False, "auto"):
        use_epilogues(choice, torch.device(device), dtype, block)
        assert block.epilogues == choice
