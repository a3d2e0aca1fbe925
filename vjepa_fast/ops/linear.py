"""Linear layers in float32 on a CPU, where PyTorch's own choice is not the fastest.

``linear`` is ``F.linear`` that takes the faster matrix product of the two that PyTorch has on a CPU. ``F.linear`` calls
MKL; oneDNN is mostly faster on the shapes of a transformer for ``x W^T`` and for the gradient in ``x`` (figures:
docs/performance.md), and applies GELU while it is in cache. The gradients in ``W`` and the bias are a kernel of our
own, csrc/outer.h. Everywhere else this is ``F.linear``.

``block_linear`` and ``feed_forward`` are the layers of a transformer block in C++ (csrc/linear.cpp), without autograd:
layers/cpu_block.py calls them, where `_cpp.LOADED`, from its own node of autograd; they take contiguous tensors.

Legend: I inputs, O outputs, E width of a block, F its hidden width.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from vjepa_fast.ops import _cpp

_PORTION = 512  # rows of the feed-forward's backward at a time: the gradient of the hidden layer is never there for all
_OneDnn = Callable[[Tensor, Tensor, "Tensor | None", str], Tensor]


@functools.cache
@torch.inference_mode(False)
def _onednn() -> _OneDnn | None:
    """OneDNN's x W^T + b as a function of (x, W, b, activation), or None where this PyTorch has none."""
    if not torch.backends.mkldnn.is_available():
        return None
    product: Any = getattr(torch.ops.mkldnn, "_linear_pointwise", None)
    if product is None:
        return None
    try:  # not a public function: use it only if it does what we think
        # no random numbers: the caller's are counted
        x, w, b = (torch.linspace(-1, 1, n, dtype=torch.float32, device="cpu") for n in (12, 15, 5))
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


def product(x: Tensor, weight: Tensor, bias: Tensor | None = None, activation: str = "none") -> Tensor:
    """OneDNN's x W^T + b, float32 on a CPU, without autograd: x [...,I], weight [O,I] (any strides) -> [...,O].

    ``activation``: ``none`` or ``gelu`` (exact), applied to the result.

    Raises:
        RuntimeError: this PyTorch has no such product; see ``has_product``.
    """
    onednn = _onednn()
    if onednn is None:
        raise RuntimeError("product: this PyTorch has no oneDNN product; use F.linear")
    return onednn(x, weight, bias, activation)


def add_outer(grad: Tensor, x: Tensor, dw: Tensor, db: Tensor) -> None:
    """``dw += grad^T x`` and ``db +=`` the column sums of grad, in place: the gradients of a linear layer.

    float32 on a CPU: grad [...,O], x [...,I], dw [O,I], db [O]. csrc/linear.cpp where it was built, PyTorch elsewhere.
    """
    grad, x = (t.reshape(-1, t.shape[-1]).contiguous() for t in (grad, x))
    if _cpp.LOADED:
        torch.ops.vjepa_fast_cpp.add_outer(grad, x, dw, db)
    else:
        dw.addmm_(grad.t(), x)
        db += grad.sum(0)


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor, b: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, w)
        return product(x, w, b)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]  # the decorator's types
        x, w = ctx.saved_tensors
        (grad,), (wants_x, wants_w, wants_b) = grads, ctx.needs_input_grad
        dx = product(grad, w.t()) if wants_x else None
        if not wants_w:
            return dx, None, grad.reshape(-1, len(w)).sum(0) if wants_b else None
        dw, db = outer(grad, x)
        return dx, dw, db if wants_b else None


def _supports(x: Tensor, w: Tensor) -> bool:
    if torch.compiler.is_compiling() or x.device.type != "cpu" or torch.is_autocast_enabled("cpu"):
        return False
    return x.dtype == w.dtype == torch.float32 and x.numel() > 0 and has_product()


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``F.linear``: x [...,I], weight [O,I], bias [O] -> [...,O]. Differentiable (once, in float32 on a CPU)."""
    return _Product.apply(x, weight, bias) if _supports(x, weight) else F.linear(x, weight, bias)


def linear_gelu(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``F.gelu(F.linear(x, weight, bias))`` (exact GELU), in one pass where nothing needs the sum before it."""
    if not torch.is_grad_enabled() and _supports(x, weight):
        return product(x, weight, bias, "gelu")
    return F.gelu(linear(x, weight, bias))


# -- layers of a transformer block in C++ -----------------------------------------------------------------------------
def _rows(x: Tensor) -> Tensor:
    return x.view(-1, x.shape[-1])


def block_linear(x: Tensor, w: Tensor, b: Tensor, other: Tensor | None = None) -> Tensor:
    """X W^T + b (+ other): x [...,I], w [O,I], b [O], other [...,O] -> [...,O]."""
    out = x.new_empty(*x.shape[:-1], len(w))
    torch.ops.vjepa_fast_cpp.linear(_rows(x), w, b, _cpp.nothing() if other is None else _rows(other), _rows(out))
    return out


def block_linear_backward(grad: Tensor, w: Tensor) -> Tensor:
    """The gradient in x of x W^T: grad [...,O], w [O,I] -> [...,I]."""
    out = grad.new_empty(*grad.shape[:-1], w.shape[1])
    torch.ops.vjepa_fast_cpp.linear_backward(_rows(grad), w, _rows(out))
    return out


def outer(grad: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    """The gradients (dw [O,I], db [O]) of a linear layer: grad [...,O], x [...,I]; see ``add_outer``."""
    dw, db = grad.new_zeros(grad.shape[-1], x.shape[-1]), grad.new_zeros(grad.shape[-1])
    add_outer(grad, x, dw, db)
    return dw, db


def feed_forward(
    x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor, other: Tensor, keep: bool
) -> tuple[Tensor, Tensor]:
    """``other`` + gelu(x W1^T + b1) W2^T + b2, some rows at a time through both layers.

    x, other [...,E], w1 [F,E], b1 [F], w2 [E,F], b2 [E] -> [...,E], and with ``keep`` what comes before the GELU,
    [n,F] of the n rows of x, for the backward (else empty).
    """
    out = torch.empty_like(other)
    hidden = x.new_empty(_rows(x).shape[0], len(w1)) if keep else _cpp.nothing()
    torch.ops.vjepa_fast_cpp.feed_forward(_rows(x), w1, b1, w2, b2, _rows(other), hidden, _rows(out))
    return out, hidden


def feed_forward_backward(
    grad: Tensor, x: Tensor, hidden: Tensor, w1: Tensor, w2: Tensor, portion: int = _PORTION
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The gradients (dx [...,E], dw1, db1, dw2, db2) of ``feed_forward``, that of ``other`` being ``grad`` [...,E].

    ``hidden`` is what it kept; ``portion`` rows are worked on at a time.
    """
    dx = torch.empty_like(x)
    dw1, db1, dw2, db2 = (w1.new_zeros(shape) for w in (w1, w2) for shape in (w.shape, len(w)))
    torch.ops.vjepa_fast_cpp.feed_forward_backward(
        _rows(grad), _rows(x), hidden, w1, w2, portion, _rows(dx), dw1, db1, dw2, db2
    )
    return dx, dw1, db1, dw2, db2
