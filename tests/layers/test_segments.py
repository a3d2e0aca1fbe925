"""Attention within segments, and the packed passes of encoder and predictor that stand on it."""

import pytest
import torch
import torch.nn.functional as F

from vjepa_fast.errors import ConfigError
from vjepa_fast.layers import segments
from vjepa_fast.models import build_encoder, build_predictor

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture(autouse=True)
def automatic():
    yield
    segments.choose("auto")
    segments._measured.clear()


def qkv(k, dtype=torch.float64, device="cpu", heads=2, width=8):
    g = torch.Generator().manual_seed(0)
    shape = (3, k, heads, width)
    return [torch.randn(shape, generator=g, dtype=torch.float64).to(device, dtype).requires_grad_() for _ in range(3)]


def masked(q, k, v, lengths):
    """One dense attention under a block-diagonal mask."""
    owner = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths)).to(q.device)
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=owner[:, None] == owner).transpose(1, 2)


@pytest.mark.parametrize("lengths", [[7], [5, 2], [1, 3, 3]])
def test_segments_do_not_see_each_other(lengths):
    parts = qkv(7)
    out, want = segments.attention(*parts, lengths), masked(*parts, lengths)
    torch.testing.assert_close(out, want, rtol=1e-12, atol=1e-12)
    g = torch.randn(out.shape, dtype=out.dtype)
    for a, b in zip(torch.autograd.grad(out, parts, g), torch.autograd.grad(want, parts, g)):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", [n for n in segments.NAMES if n != "auto"])
def test_every_backend_that_serves_agrees(name):
    parts = qkv(150, torch.bfloat16, DEVICE, width=64)
    segments.choose(name)
    reasons = segments.objections(name, parts[0])
    if reasons:
        with pytest.raises(ConfigError) as error:
            segments.attention(*parts, [100, 50])
        assert all(reason in str(error.value) for reason in reasons)
        return
    out, want = segments.attention(*parts, [100, 50]), masked(*parts, [100, 50])
    torch.testing.assert_close(out, want, rtol=2e-2, atol=2e-2)


def test_reasons_are_listed():
    q = torch.zeros(1, 2, 1, 8)
    assert segments.objections("sdpa", q) == []
    reasons = segments.objections("varlen", q)
    assert reasons[0] == "it needs CUDA, the tokens are on cpu"
    assert "it takes float16 and bfloat16, got float32" in reasons
    with pytest.raises(ConfigError, match="runtime.attention: 'flash'; accepted: auto, varlen, xformers, sdpa"):
        segments.choose("flash")


def test_the_quickest_is_measured_once_and_kept(monkeypatch):
    timed = []
    monkeypatch.setattr(segments, "_seconds", lambda fn, *a: timed.append(fn) or {"a": 2.0, "b": 1.0}[fn])
    monkeypatch.setattr(segments, "_BACKENDS", {"a": "a", "b": "b", "c": "c"})
    monkeypatch.setattr(segments, "objections", lambda name, q: ["no"] if name == "c" else [])
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    q = torch.zeros(1, 200, 1, 8)
    assert segments._fastest(q, q, q, (120, 80)) == "b" == segments._fastest(q, q, q, (100, 90))
    assert timed == ["a", "b"]


@pytest.mark.parametrize("use_rope", [True, False])
def test_packed_passes_equal_one_pass_per_mask(use_rope):
    torch.manual_seed(0)
    enc = build_encoder(embed_dim=24, depth=4, num_heads=2, img_size=32, patch_size=8, num_frames=4, use_rope=use_rope)
    pred = build_predictor(enc, embed_dim=12, depth=2, num_heads=2, zero_init_mask_tokens=False)
    enc, pred = enc.double(), pred.double()
    clip = torch.randn(2, 3, 4, 32, 32, dtype=torch.float64)
    seen = [torch.stack([torch.randperm(32)[:k].sort().values for _ in range(2)]) for k in (13, 5)]
    hidden = [torch.stack([torch.randperm(32)[:k].sort().values for _ in range(2)]) for k in (7, 20)]

    def packed():
        z = enc(clip, masks=seen)
        return [z, *pred(z, seen, hidden, [0, 1])]

    def apart():
        z = [enc(clip, masks=m) for m in seen]
        out = [pred(x, e, p, j) for j, (x, e, p) in enumerate(zip(z, seen, hidden))]
        return [z, [p for p, _ in out], [c for _, c in out]]

    grads = []
    weights = [p for p in (*enc.parameters(), *pred.parameters()) if p.requires_grad]
    outs = []
    for make in (packed, apart):
        out = [x for part in make() for x in part]
        total = sum((x * torch.linspace(-1, 1, x.numel(), dtype=x.dtype).view_as(x)).sum() for x in out)
        outs.append(out)
        grads.append(torch.autograd.grad(total, weights, allow_unused=True))
    for a, b in zip(*outs):
        assert a.is_contiguous()
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)
    for a, b in zip(*grads):
        assert (a is None) == (b is None)
        if a is not None:
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)
