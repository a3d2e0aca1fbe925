"""``Linear``: ``nn.Linear`` that takes the faster matrix product of the two that PyTorch has on a CPU.

In float32 on a CPU, ``F.linear`` calls MKL. oneDNN, which PyTorch also carries, is mostly faster on the shapes of a
transformer for ``x W^T`` and for the gradient in ``x`` (figures: docs/performance.md), and applies GELU while it is
in cache. The gradients in ``W`` and the bias are a kernel of our own, csrc/outer.cpp. Everywhere else this is
``F.linear``. Blocks in float32 on a CPU do not come here: layers/cpu_block.py.
"""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F
from torch import Tensor

from vjepa_fast.ops import _cpp


@functools.cache
def _onednn():
    """OneDNN's x W^T + b as a function of (x, W, b, activation), or None where this PyTorch has none."""
    if not torch.backends.mkldnn.is_available():
        return None
    product = getattr(torch.ops.mkldnn, "_linear_pointwise", None)
    if product is None:
        return None
    try:  # not a public function: use it only if it does what we think
        x, w, b = (torch.linspace(-1, 1, n) for n in (12, 15, 5))  # no random numbers: the caller's are counted
        x, w = x.view(4, 3), w.view(5, 3)
        for activation in ("none", "gelu"):
            want = F.linear(x, w, b) if activation == "none" else F.gelu(F.linear(x, w, b))
            torch.testing.assert_close(product(x, w, b, activation, [], "none"), want, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(product(x, w.t().contiguous().t(), None, "none", [], ""), x @ w.t())
    except (RuntimeError, AssertionError, NotImplementedError, AttributeError):
        return None
    return lambda x, w, b, activation: product(x, w, b, activation, [], "none")


def has_product() -> bool:
    """Whether ``product`` can be called here."""
    return _onednn() is not None


def product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """OneDNN's x W^T + b, float32 on a CPU, without autograd: x [...,I], weight [O,I] (any strides) -> [...,O]."""
    return _onednn()(x, weight, bias, "none")


def add_outer(grad: Tensor, x: Tensor, dw: Tensor, db: Tensor) -> None:
    """``dw += grad^T x`` and ``db +=`` the column sums of grad, in place: the gradients of a linear layer.

    float32 on a CPU: grad [...,O], x [...,I], dw [O,I], db [O]. csrc/outer.cpp where it was built, PyTorch elsewhere.
    """
    grad, x = (t.reshape(-1, t.shape[-1]).contiguous() for t in (grad, x))
    if _cpp.LOADED:
        torch.ops.vjepa_fast_cpp.add_outer(grad, x, dw, db)
    else:
        dw.addmm_(grad.t(), x)
        db += grad.sum(0)


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, w: Tensor, b: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, w)
        ctx.has_bias = b is not None
        return _onednn()(x, w, b, "none")

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad: Tensor):
        x, w = ctx.saved_tensors
        wants_x, wants_w, wants_b = ctx.needs_input_grad
        dx = _onednn()(grad, w.t(), None, "none") if wants_x else None
        if not wants_w:
            return dx, None, grad.reshape(-1, len(w)).sum(0) if wants_b else None
        dw, db = torch.zeros_like(w), w.new_zeros(len(w))
        add_outer(grad, x, dw, db)
        return dx, dw, db if wants_b else None


def _serves(x: Tensor, w: Tensor) -> bool:
    if torch.compiler.is_compiling() or x.device.type != "cpu" or torch.is_autocast_enabled("cpu"):
        return False
    return x.dtype == w.dtype == torch.float32 and x.numel() > 0 and _onednn() is not None


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``F.linear``: x [...,I], weight [O,I], bias [O] -> [...,O]. Differentiable (once, in float32 on a CPU)."""
    return _Product.apply(x, weight, bias) if _serves(x, weight) else F.linear(x, weight, bias)


def linear_gelu(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``F.gelu(F.linear(x, weight, bias))`` (exact GELU), in one pass where nothing needs the sum before it."""
    if not torch.is_grad_enabled() and _serves(x, weight):
        return _onednn()(x, weight, bias, "gelu")
    return F.gelu(linear(x, weight, bias))
