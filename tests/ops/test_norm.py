"""target_norm against the published values and torch's own layer norm."""

import pathlib

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from vjepa_fast import ops
from vjepa_fast.ops.norm import _target_norm

GOLDENS = pathlib.Path(__file__).parent.parent / "goldens"


@pytest.mark.parametrize(("dtype", "name", "tol"), [(torch.float32, "f32", 1e-5), (torch.float64, "f64", 1e-10)])
def test_golden_values_and_gradients(dtype, name, tol):
    with np.load(GOLDENS / "losses_small.npz") as data:
        keys = ("in", "cot", f"out/{name}", f"grad_noema/{name}")
        h, cot, out, grad = (torch.from_numpy(data[f"target_ln/{k}"]).to(dtype) for k in keys)
    h.requires_grad_()
    result = ops.target_norm(h, 4)
    torch.testing.assert_close(result, out, rtol=tol, atol=tol)
    torch.testing.assert_close(torch.autograd.grad(result, h, cot)[0], grad, rtol=tol, atol=tol * grad.abs().max())


@pytest.mark.parametrize("levels", [1, 3])
def test_each_level_is_a_layer_norm(levels):
    h = torch.randn(2, 5, 12, dtype=torch.float64) * 3 + 1
    expected = torch.cat([F.layer_norm(x, x.shape[-1:]) for x in h.chunk(levels, -1)], -1)
    torch.testing.assert_close(ops.target_norm(h, levels), expected, rtol=1e-12, atol=1e-12)


def test_bfloat16_is_normalised_in_float32_and_stored_as_bfloat16():
    h = (torch.randn(4, 64) + 30).bfloat16()  # a mean far from 0: bfloat16 statistics would be off
    out = ops.target_norm(h, 2)
    assert out.dtype == torch.bfloat16
    assert torch.equal(out, ops.target_norm(h.float(), 2).bfloat16())


def test_gradcheck_opcheck_and_compile():
    h = torch.randn(2, 3, 8, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: ops.target_norm(x, 2), (h,))
    for x in (h.float().detach().requires_grad_(), torch.randn(8, 3).t().bfloat16(), torch.randn(0, 3, 8)):
        torch.library.opcheck(_target_norm, (x, 2))
    x = torch.randn(2, 3, 8, requires_grad=True)
    fn = lambda x: (ops.target_norm(x * 2, 4) ** 3).sum()  # noqa: E731
    compiled = torch.compile(fn, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(*(torch.autograd.grad(f(x), x)[0] for f in (fn, compiled)))


@pytest.mark.parametrize(
    ("h", "levels", "text"),
    [
        (torch.zeros(2, 10), 4, r"h: expected .* with D a multiple of levels=4, got float32 \[2, 10\]"),
        (torch.zeros(2, 8, dtype=torch.int64), 4, "h: expected a floating tensor .* got int64"),
        (torch.zeros(2, 8), 0, "levels: expected a positive int, got 0"),
    ],
)
def test_argument_errors(h, levels, text):
    with pytest.raises(ValueError, match="target_norm: " + text):
        ops.target_norm(h, levels)
