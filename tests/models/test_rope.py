from __future__ import annotations

import math

import pytest
import torch

from vjepa_fast import ops
from vjepa_fast.layers import attention
from vjepa_fast.layers.attention import rotary
from vjepa_fast.models import rope

CPU = torch.device("cpu")


def table(grid, head_dim=16, variant="v2.1", base=None, dtype=torch.float64):
    return rope.rope_table(grid, head_dim, variant, base, dtype, CPU, variant == "v2.1")


def rotate_by_hand(x, position, variant, stretch=(1.0, 1.0, 1.0)):
    """One head vector at (t,h,w), channel by channel."""
    third = 2 * ((len(x) // 3) // 2)
    out = list(x)
    for axis in range(3):
        for i in range(third):
            c = axis * third + i
            frequency = i // 2 if variant == "v2.1" else i % (third // 2)
            angle = position[axis] * stretch[axis] * 10000 ** (-frequency / (third / 2))
            partner = -x[c + 1] if i % 2 == 0 else x[c - 1]
            out[c] = x[c] * math.cos(angle) + partner * math.sin(angle)
    return out


@pytest.mark.parametrize("variant", ["v2", "v2.1"])
@pytest.mark.parametrize("head_dim", [6, 16, 20, 64])
def test_rotation_by_hand(variant, head_dim):
    grid, base = (2, 3, 4), 16
    torch.manual_seed(0)
    n = 24
    qkv = torch.randn(1, n, 3 * head_dim, dtype=torch.float64)
    full = table(grid, head_dim, variant, base)
    if full.is_complex():
        turned = rotary.turned(qkv[..., :head_dim].view(1, n, 1, 1, head_dim), full).view(n, head_dim)
    else:
        turned = ops.rope3d(qkv, full, 1)[0, :, :head_dim]
    stretch = (1.0, 15 / 2, 15 / 3)
    for token in range(n):
        position = (token // 12, token // 4 % 3, token % 4)
        want = rotate_by_hand(qkv[0, token, :head_dim].tolist(), position, variant, stretch)
        tolerance = 1e-12 if full.is_complex() else 1e-5  # the real table is float32
        assert torch.allclose(turned[token], torch.tensor(want, dtype=torch.float64), atol=tolerance)


def test_complex_and_real_forms_agree():
    torch.manual_seed(0)
    grid, heads, d = (2, 3, 4), 3, 20
    qkv = torch.randn(2, 10, 3 * heads * d)
    idx = torch.stack([torch.randperm(24)[:10] for _ in range(2)])
    real = rope.rope_table(grid, d, "v2.1", None, torch.float32, CPU, False)
    rotor = table(grid, d, dtype=torch.float32)
    assert rotor.is_complex() and not real.is_complex()
    got = attention.attend(qkv, rotor[idx], heads)
    want = attention.attend(qkv, real[idx], heads)
    assert torch.allclose(got, want, atol=1e-5)
    with torch.no_grad():  # the in-place form of the real path
        assert torch.allclose(attention.attend(qkv.clone(), real[idx], heads), want, atol=1e-6)


def test_rotors_are_for_float64_and_where_no_kernel_serves(monkeypatch):
    held = lambda variant, dtype: rope.as_rotor(variant, dtype, CPU)  # noqa: E731
    assert held("v2.1", torch.float64) and not held("v2", torch.float64)
    with ops.use_backend("eager"):
        assert held("v2.1", torch.float32) and not held("v2", torch.float32)
    with ops.use_backend("auto"):
        for reason in ("", "not built"):
            monkeypatch.setattr(ops, "backend_report", lambda reason=reason: {"rope3d": {"cpp": reason}})
            assert held("v2.1", torch.float32) == bool(reason)


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_attention_sees_relative_positions_only(axis):
    """v2.1 turns channel pairs, so shifting all tokens by one step along an axis changes nothing."""
    torch.manual_seed(0)
    grid, heads, d = (4, 4, 4), 2, 18
    qkv = torch.randn(1, 27, 3 * heads * d, dtype=torch.float64)
    ids = torch.arange(64).view(grid)
    here = ids[:3, :3, :3].flatten()
    there = (ids[:3, :3, :3] + (16, 4, 1)[axis]).flatten()
    full = table(grid, d)
    assert torch.allclose(
        attention.attend(qkv, full[here], heads), attention.attend(qkv, full[there], heads), atol=1e-12
    )
    other = attention.attend(qkv, full[here * 0], heads)
    assert not torch.allclose(attention.attend(qkv, full[here], heads), other, atol=1e-3)


def test_interpolation_maps_every_grid_to_the_base_grid():
    near, far = table((1, 4, 4), base=16), table((1, 16, 16), base=16)
    assert torch.allclose(near[-1], far[-1]) and torch.allclose(near[0], far[0])
    assert torch.allclose(near[5], far[5 * 16 + 5])  # 1 of 3 steps is 5 of 15
    assert not torch.allclose(table((1, 4, 4))[-1], far[-1])
    assert torch.equal(table((3, 1, 1), base=16), table((3, 1, 1)))  # one patch: nothing to stretch, and no 0/0


def test_base_grid():
    assert [rope.base_grid(p) for p in (8, 14, 16, 32)] == [32, 18, 16, 8]


def test_angles_stay_float32_under_autocast():
    """At t = 900 an angle in bfloat16 would be off by radians."""
    torch.manual_seed(0)
    d = 12
    full = table((1000, 1, 1), d, dtype=torch.float32)
    qkv = torch.randn(1, 2, 3 * d)
    want = rotary.turned(qkv[..., :d].view(1, 2, 1, 1, d), full[[899, 900]])
    with torch.autocast("cpu", torch.bfloat16):
        got = rotary.turned(qkv.bfloat16()[..., :d].view(1, 2, 1, 1, d), full[[899, 900]])
    assert got.dtype == torch.bfloat16
    assert (got.float() - want).abs().max() < 0.03


def test_table_is_kept():
    assert table((2, 3, 4)) is table((2, 3, 4))


def test_table_made_in_inference_mode_can_be_trained_with():
    grid = (2, 5, 3)
    with torch.inference_mode():
        rope.rope_table(grid, 12, "v2.1", 7, torch.float32, CPU, True)
    full = rope.rope_table(grid, 12, "v2.1", 7, torch.float32, CPU, True)
    qkv = torch.randn(1, 30, 36, requires_grad=True)
    attention.attend(qkv, full, 1).sum().backward()
    assert qkv.grad is not None


@pytest.mark.parametrize("uniform", [True, False])
def test_sincos_by_hand(uniform):
    dim, grid = 24, (2, 3, 2)
    got = rope.sincos_3d(dim, grid, uniform)
    assert got.shape == (1, 12, dim) and got.dtype == torch.float32
    widths = (8, 8, 8) if uniform else (12, 6, 6)
    for n in range(12):
        want = []
        for pos, width in zip((n // 6, n // 2 % 3, n % 2), widths):
            phases = [pos * 10000 ** (-i / (width / 2)) for i in range(width // 2)]
            want += [math.sin(p) for p in phases] + [math.cos(p) for p in phases]
        assert torch.allclose(got[0, n], torch.tensor(want), atol=1e-6)


def test_sincos_of_another_grid():
    built = rope.sincos_3d(24, (4, 4, 4), True)
    assert torch.equal(rope.resize_sincos(built, (4, 4, 4), (2, 4, 4)), built[:, :32])
    assert rope.resize_sincos(built, (4, 4, 4), (4, 6, 3)).shape == (1, 72, 24)
