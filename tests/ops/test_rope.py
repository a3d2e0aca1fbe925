"""rope3d against the formula written out channel by channel."""

import pytest
import torch

from vjepa_fast import ops
from vjepa_fast.ops.rope import _rope3d, _rope3d_inplace

B, K, HEADS, D, R = 2, 5, 2, 8, 6


def table_of(angles):
    return torch.stack((angles.cos(), angles.sin()), -2).float()


def angles_v21(*shape, r=R, seed=0):
    """Both channels of a pair share an angle."""
    return torch.randn(*shape, r // 2, generator=torch.Generator().manual_seed(seed)).repeat_interleave(2, -1)


def angles_v2(*shape, r=R, seed=0):
    """Every channel its own angle, as when frequencies repeat in halves."""
    return torch.randn(*shape, r, generator=torch.Generator().manual_seed(seed))


def by_hand(qkv, table, heads):
    x = qkv.double().unflatten(-1, (3, heads, -1))
    table = table.double().expand(qkv.shape[0], *table.shape[-3:])
    out = x.clone()
    for part in (0, 1):
        for c in range(table.shape[-1]):
            partner = -x[:, :, part, :, c + 1] if c % 2 == 0 else x[:, :, part, :, c - 1]
            cos, sin = table[:, :, 0, c, None], table[:, :, 1, c, None]
            out[:, :, part, :, c] = x[:, :, part, :, c] * cos + partner * sin
    return out.flatten(-3)


@pytest.mark.parametrize("angles", [angles_v21(K), angles_v2(K), angles_v2(B, K), angles_v21(B, K, r=D)])
@pytest.mark.parametrize(("dtype", "tol"), [(torch.float64, 1e-12), (torch.float32, 1e-6), (torch.bfloat16, 8e-3)])
def test_formula(angles, dtype, tol):
    qkv, table = torch.randn(B, K, 3 * HEADS * D).to(dtype), table_of(angles)
    out = ops.rope3d(qkv, table, HEADS)
    assert out.dtype == dtype and out.data_ptr() != qkv.data_ptr()
    torch.testing.assert_close(out.double(), by_hand(qkv, table, HEADS), rtol=tol, atol=tol)
    in_place = qkv.clone()
    assert ops.rope3d_(in_place, table, HEADS) is in_place and torch.equal(in_place, out)
    values = slice(2 * HEADS * D, None)
    assert torch.equal(out[..., values], qkv[..., values])


def test_odd_head_dim_and_strided_input():
    table = table_of(angles_v2(K, r=4))
    qkv = torch.randn(B, K, 3 * HEADS * 5 + 1)[..., 1:]
    torch.testing.assert_close(ops.rope3d(qkv, table, HEADS).double(), by_hand(qkv, table, HEADS), rtol=1e-6, atol=1e-6)


def test_v21_keeps_norms_and_depends_on_relative_positions_only():
    freq = torch.tensor([1.0, 0.3, 0.05]).repeat_interleave(2)
    qkv = torch.randn(1, 1, 3 * D, dtype=torch.float64).expand(1, K, -1).contiguous()

    def scores(start):
        x = ops.rope3d(qkv, table_of((torch.arange(K) + start)[:, None] * freq), 1).unflatten(-1, (3, D))
        return x[:, :, 0] @ x[:, :, 1].transpose(1, 2), x[:, :, 0].norm(dim=-1)

    (a, norm), (b, _) = scores(0), scores(9)
    torch.testing.assert_close(a, b, rtol=0, atol=1e-5)  # the table is float32
    torch.testing.assert_close(norm, qkv[:, :, :D].norm(dim=-1), rtol=1e-6, atol=0)


@pytest.mark.parametrize("angles", [angles_v21(K), angles_v2(B, K)])
def test_gradients(angles):
    qkv = torch.randn(B, K, 3 * HEADS * D, dtype=torch.float64, requires_grad=True)
    table = table_of(angles)
    assert torch.autograd.gradcheck(lambda x: ops.rope3d(x, table, HEADS), (qkv,))
    assert torch.autograd.gradgradcheck(lambda x: ops.rope3d(x, table, HEADS), (qkv,))


def test_opcheck_and_compile():
    table = table_of(angles_v2(K))
    for x in (torch.randn(B, K, 48, requires_grad=True), torch.randn(K, B, 48).transpose(0, 1).bfloat16()):
        torch.library.opcheck(_rope3d, (x, table, HEADS))
    torch.library.opcheck(_rope3d_inplace, (torch.randn(B, K, 48), table, HEADS))
    x = torch.randn(B, K, 48, requires_grad=True)
    fn = lambda x: (ops.rope3d(x * 2, table, HEADS).sin()).sum()  # noqa: E731
    compiled = torch.compile(fn, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(*(torch.autograd.grad(f(x), x)[0] for f in (fn, compiled)))
    with torch.no_grad():
        in_place = torch.compile(lambda x: ops.rope3d_(x * 2, table, HEADS), fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(in_place(x), ops.rope3d(x * 2, table, HEADS))


def test_in_place_refuses_gradients():
    x = torch.randn(B, K, 48, requires_grad=True)
    with pytest.raises(ValueError, match="rope3d_: qkv: .* use rope3d"):
        ops.rope3d_(x * 1, table_of(angles_v2(K)), HEADS)


@pytest.mark.parametrize(
    ("qkv", "table", "text"),
    [
        (torch.zeros(B, K, 50), torch.zeros(K, 2, R), r"qkv: expected a floating tensor \[B,K,3\*E\]"),
        (torch.zeros(K, 48), torch.zeros(K, 2, R), "qkv: .* got float32"),
        (torch.zeros(B, K, 48), torch.zeros(K + 1, 2, R), r"table: expected float32 \[5,2,R\] or \[2,5,2,R\]"),
        (torch.zeros(B, K, 48), torch.zeros(K, 2, D + 2), "table: .* R even and at most 8"),
        (torch.zeros(B, K, 48), torch.zeros(K, 2, 5), "table: .* R even"),
        (torch.zeros(B, K, 48), torch.zeros(B + 1, K, 2, R), "table: "),
        (torch.zeros(B, K, 48), torch.zeros(K, 2, R).double(), r"table: .* got float64 \[5, 2, 6\]"),
    ],
)
def test_argument_errors(qkv, table, text):
    with pytest.raises(ValueError, match="rope3d: " + text):
        ops.rope3d(qkv, table, HEADS)
