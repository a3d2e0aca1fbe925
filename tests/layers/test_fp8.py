"""8-bit linear layers: rounding, product, gradients against the formula. PyTorch has the scaled product on CPUs too."""

import pytest
import torch
import torch.nn.functional as F

from vjepa_fast.layers import fp8
from vjepa_fast.layers.linear import Linear


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("x", [random(40, 48), 1e4 * random(7, 16) ** 3, torch.zeros(3, 16), 1e-20 * torch.ones(2, 16)])
def test_rounding_is_within_a_sixteenth(x, dtype):
    x = x.to(dtype)
    q, scale = fp8.quantise(x)
    assert q.dtype == torch.float8_e4m3fn and scale.dtype == torch.float32 and scale.shape == ()
    back = q.float() * scale
    assert bool(((back - x.float()).abs() <= torch.maximum(x.float().abs() / 16, scale / 1024)).all())
    if x.abs().max() > 1e-10:
        assert q.float().abs().max() == 448  # the whole range is used, and nothing is NaN
        torch.testing.assert_close(back.abs().max(), x.abs().max().float())


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(2, 5, 32), (33, 32), (1, 32)])
def test_product_and_gradients(shape, bias):
    x, w = random(*shape).requires_grad_(), (0.1 * random(48, 32, seed=1)).requires_grad_()
    b = random(48, seed=2).requires_grad_() if bias else None
    out = fp8.linear(x, w, b)
    assert out.shape == (*shape[:-1], 48) and out.dtype == torch.bfloat16

    (xq, xs), (wq, ws) = fp8.quantise(x), fp8.quantise(w)
    emulated = F.linear(xq.float() * xs, wq.float() * ws, b)
    torch.testing.assert_close(out.float(), emulated, rtol=1e-2, atol=1e-2)  # bfloat16 of the result and of the bias
    exact = F.linear(x, w, b)
    bound = F.linear(x.abs(), w.abs()) * (2 / 16 + 1 / 256) + 2 * 2**-8 * (exact.abs() + 1) + 1e-2
    assert bool(((out.float() - exact).abs() <= bound).all())
    assert (out.float() - exact).norm() < 0.05 * exact.norm() and not torch.equal(out, exact.bfloat16())

    grad = random(*out.shape, seed=3).bfloat16()
    leaves = [t for t in (x, w, b) if t is not None]
    found = torch.autograd.grad(out, leaves, grad)
    want = torch.autograd.grad(F.linear(x.bfloat16(), w.bfloat16(), None if b is None else b.bfloat16()), leaves, grad)
    for leaf, f, g in zip(leaves, found, want):
        assert f.dtype == leaf.dtype
        torch.testing.assert_close(f, g, rtol=2e-2, atol=2e-2)


def test_layer_under_autocast_and_compiled():
    layer = Linear(32, 48)
    x = random(4, 6, 32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        plain = layer(x), layer.gelu(x)
        layer.fp8 = True
        ours = layer(x), layer.gelu(x)
    for a, b, at in zip(ours, plain, ("product", "gelu")):
        assert a.dtype == b.dtype == torch.bfloat16 and not torch.equal(a, b), at
        assert (a - b).float().norm() < 0.06 * b.float().norm(), at
    torch._dynamo.reset()
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = compiled(x)
    torch.testing.assert_close(out, ours[0], rtol=1e-2, atol=1e-2)
    out.float().square().sum().backward()
    assert layer.weight.grad.dtype == torch.float32 and layer.weight.grad.abs().sum() > 0
    assert layer(x[:0]).shape == (0, 6, 48)


def test_who_may_use_it(monkeypatch):
    assert fp8.objections(torch.device("cpu")) == ["needs a CUDA device, this run is on cpu"]
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 6))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Card")
    assert fp8.objections(torch.device("cuda")) == ["needs compute capability 8.9 or later, Card has 8.6"]
    for capability in ((8, 9), (9, 0), (12, 0)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, c=capability: c)
        assert fp8.objections(torch.device("cuda")) == []
