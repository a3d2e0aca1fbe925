"""The blocks for a GPU, on a CPU by the eager code of their ops or by interpreted kernels, against the plain ones."""

import pytest
import torch
from torch import nn

from tests.ops.parity import DEVICE, KERNELS
from vjepa_fast import ops
from vjepa_fast.layers import fused_block
from vjepa_fast.layers.attention import DeviceSegments
from vjepa_fast.layers.block import Block, run_blocks
from vjepa_fast.models import rope

GRID = (4, 5, 5)
BACKENDS = ["eager", *KERNELS[1:]]
WIDTH, HEADS, TOKENS = 48, 4, 23


def make(depth=3, levels=(1, 2), batch=1, seed=0):
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
    for n, (o, p, e) in enumerate(zip(ours, eager, exact)):
        bound = factor * (p - e).abs().max() + 1e-5 * e.abs().max()
        assert (o - e).abs().max() <= bound, f"output {n}: {(o - e).abs().max():.3g} over {bound:.3g}"


@pytest.mark.parametrize("lengths", [None, [10, 13]])
def test_in_float32_it_is_the_plain_block(lengths):
    """By the eager code of the ops: what is tested is how they are put together."""
    made = make(batch=2)
    exact = results(plain, made, torch.float64, lengths, half=False)
    eager = results(plain, made, torch.float32, lengths, half=False)
    with ops.use_backend("eager"):
        hold(results(fused, made, torch.float32, lengths, half=False), eager, exact, factor=4.0)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("how", ["triton", "torch"])
def test_under_autocast(backend, how):
    made = make()
    exact = results(plain, made, torch.float64, None, half=False)
    eager = results(plain, made, torch.float32, None, half=True)
    for block in made[0][0]:
        block.epilogues = how
    with ops.use_backend(backend):
        ours = results(fused, made, torch.float32, None, half=True)
        again = results(fused, made, torch.float32, None, half=True)
    hold(ours, eager, exact)
    assert all(torch.equal(a, b) for a, b in zip(ours, again))


@pytest.mark.parametrize("backend", BACKENDS)
def test_segments_on_the_device(backend):
    """As plain lengths, filler at the end with segments of its own."""
    made = make()
    sizes = torch.tensor([10, 9, 4, 0], device=DEVICE)
    with ops.use_backend(backend):
        want = results(fused, made, torch.float32, [10, 9, 4], half=True)
        got = results(fused, made, torch.float32, DeviceSegments(sizes, 12), half=True)
    hold(got, want, results(plain, made, torch.float64, [10, 9, 4], half=False))


def test_recomputed_under_checkpointing():
    made = make()
    with ops.use_backend("eager"):
        want = results(fused, made, torch.float32, None, half=True)
        got = results(fused, made, torch.float32, None, half=True, recompute=True)
    hold(got, want, results(plain, made, torch.float64, None, half=False))


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
