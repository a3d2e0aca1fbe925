"""Products of a feed-forward with GELU (exact) or its slope as their last step, for layers/fused_block.py.

These have no autograd of their own: the block's node calls forward and backward. Three libraries can make them:

    triton   kernels/gelu.py: GELU, or slope and column sums, in the epilogue of a product of our own
    quack    the package quack-kernels (Python 3.12 or later, compute capability 9.0 or later): the same by its kernels
    torch    the product by PyTorch (cuBLAS), then one pass of a kernel

and ``auto`` takes the fastest for a shape, measured once per machine (`_fastest`).
Legend: n rows, E width of a block, F its hidden width.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import sys
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from vjepa_fast.ops import _backend, _fastest, _triton

HOW = ("auto", "triton", "quack", "torch")
Pair = tuple[Tensor, Tensor]
Triple = tuple[Tensor, Tensor, Tensor]


def gelu_linear(x: Tensor, weight: Tensor, bias: Tensor, keep: bool, how: str = "auto") -> Pair:
    """GELU(x W^T + b): x [n,E], weight [F,E] of x's dtype, bias [F] of any floating dtype.

    Args:
        x: contiguous, as ``weight``.
        weight: of the first layer.
        bias: likewise.
        keep: also return what comes before the GELU.
        how: one of ``HOW``.

    Returns:
        What comes before the GELU, [n,F] (empty without ``keep``), and the result [n,F].
    """
    return _gelu_linear(x, weight, bias, keep, how)


def gelu_linear_backward(grad: Tensor, weight: Tensor, hidden: Tensor, how: str = "auto") -> Triple:
    """The gradient before the GELU of GELU(hidden) W^T, what the GELU gave, and the column sums of the first.

    Args:
        grad: [n,E], contiguous: of the product.
        weight: [E,F], contiguous, of grad's dtype: of the second layer.
        hidden: [n,F], contiguous, as ``gelu_linear`` kept it.
        how: one of ``HOW``.

    Returns:
        [n,F] and [n,F] of grad's dtype, and [F] of promote_types(dtype, float32), the gradient of the first bias.
    """
    return _gelu_linear_backward(grad, weight, hidden, how)


@_backend.register("gelu_linear", "eager")
def _eager(x: Tensor, weight: Tensor, bias: Tensor, keep: bool, how: str) -> Pair:
    hidden = F.linear(x, weight, bias.to(x.dtype))
    return hidden if keep else x.new_empty(0), F.gelu(hidden)


@_backend.register("gelu_linear_backward", "eager")
def _eager_backward(grad: Tensor, weight: Tensor, hidden: Tensor, how: str) -> Triple:
    slope = torch.ops.aten.gelu_backward(grad @ weight, hidden)
    return slope, F.gelu(hidden), slope.sum(0, dtype=torch.promote_types(slope.dtype, torch.float32))


def _objections(*args: Any) -> list[str]:
    reasons = _triton.objections(*args[:2])
    if args and args[0].dtype == torch.float32:
        reasons.append("triton multiplies 16-bit floats, float32 is left to eager")
    return reasons


def quack_objections() -> list[str]:
    """Why quack-kernels cannot be used on this machine; empty where it can."""
    if sys.version_info < (3, 12):
        return [f"quack-kernels needs Python 3.12, this is {sys.version_info[0]}.{sys.version_info[1]}"]
    if importlib.util.find_spec("quack") is None:
        return ["the package quack-kernels is not installed"]
    if not torch.cuda.is_available() or torch.cuda.get_device_capability() < (9, 0):
        return ["quack-kernels needs compute capability 9.0 or later"]
    return []


@functools.cache
def _quack() -> Any:
    return None if quack_objections() else importlib.import_module("quack.gemm_interface")


def _tma(*tensors: Tensor) -> bool:
    """Whether the kernels can have tensor descriptors: an architecture that has them, and rows of whole 16 bytes."""
    x = tensors[0]
    if _triton.rehearsing() < 90 and (not x.is_cuda or torch.cuda.get_device_capability(x.device) < (9, 0)):
        return False
    return all(t.shape[-1] * t.element_size() % 16 == 0 and t.data_ptr() % 16 == 0 for t in tensors)


def _run(op: str, x: Tensor, columns: int, how: str, ours: Callable[[int], Any], **others: Callable[[], Any]) -> Any:
    """The result of ``how``; ``ours`` takes the number of one of ``kernels.gelu.cuts``."""
    candidates: dict[str, Callable[[], Any]] = {}
    if how in ("auto", "triton"):
        candidates |= {f"triton {cut}": functools.partial(ours, cut) for cut in range(2)}
    if how in ("auto", "quack") and _quack() is not None:
        candidates["quack"] = others["quack"]
    if how in ("auto", "torch"):
        candidates["torch"] = others["torch"]
    if not candidates:
        raise _backend.BackendError(f"{op}: quack was asked for, but {'; '.join(quack_objections())}")
    if _triton.rehearsing():  # what may be measured is built ahead
        return [run() for name, run in candidates.items() if name != "quack"][0]
    return candidates[_fastest.choose(op, x, columns, candidates)]()


@_backend.register("gelu_linear", "triton", _objections)
def _kernel(x: Tensor, weight: Tensor, bias: Tensor, keep: bool, how: str) -> Pair:
    def ours(cut: int) -> Pair:
        out = x.new_empty(len(x), len(weight))
        hidden = torch.empty_like(out) if keep else None
        tma = _tma(x, weight, out)
        tiles = _triton.launch("gelu", "cuts", x, tma)[cut]
        args = (x, weight, bias, hidden, out, None, None, tiles, tma, _triton.processors(x.device))
        _triton.launch("gelu", "product", x, *args)
        return x.new_empty(0) if hidden is None else hidden, out

    def quack() -> Pair:
        before, out = _quack().gemm_act(x, weight.t(), bias=bias, activation="gelu_erf", store_preact=keep, tuned=False)
        return before if keep else x.new_empty(0), out

    op = "gelu_linear keeping" if keep else "gelu_linear"
    return _run(op, x, len(weight), how, ours, quack=quack, torch=lambda: _eager(x, weight, bias, keep, how))


@_backend.register("gelu_linear_backward", "triton", _objections)
def _kernel_backward(grad: Tensor, weight: Tensor, hidden: Tensor, how: str) -> Triple:
    def ours(cut: int) -> Triple:
        out, slope = torch.empty_like(hidden), torch.empty_like(hidden)
        tma = _tma(grad, weight, hidden)
        tiles = _triton.launch("gelu", "cuts", grad, tma)[cut]
        partial = _partial(hidden, tiles)
        args = (grad, weight, None, hidden, out, slope, partial, tiles, tma, _triton.processors(grad.device))
        _triton.launch("gelu", "product", grad, *args)
        return slope, out, partial.sum(0)

    def plain() -> Triple:
        product = grad @ weight
        out, partial = torch.empty_like(hidden), _partial(hidden, None)
        _triton.launch("gelu", "slope", grad, product, hidden, product, out, partial)
        return product, out, partial.sum(0)

    def quack() -> Triple:
        slope, out = _quack().gemm_dact(
            grad, weight, hidden, activation="gelu_erf", dynamic_scheduler=False, tuned=False
        )
        return slope, out, slope.sum(0, dtype=torch.float32)

    return _run("gelu_linear_backward", grad, hidden.shape[1], how, ours, quack=quack, torch=plain)


def _partial(hidden: Tensor, tiles: Any) -> Tensor:
    programs = _triton.launch("gelu", "partials", hidden, len(hidden), tiles)
    return hidden.new_empty(programs, hidden.shape[1], dtype=torch.float32)


@torch.library.custom_op("vjepa_fast::gelu_linear", mutates_args=())
def _gelu_linear(x: Tensor, weight: Tensor, bias: Tensor, keep: bool, how: str) -> tuple[Tensor, Tensor]:
    return _backend.call("gelu_linear", x, weight, bias, keep, how)


@torch.library.custom_op("vjepa_fast::gelu_linear_backward", mutates_args=())
def _gelu_linear_backward(grad: Tensor, weight: Tensor, hidden: Tensor, how: str) -> tuple[Tensor, Tensor, Tensor]:
    return _backend.call("gelu_linear_backward", grad, weight, hidden, how)


@_gelu_linear.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor, keep: bool, how: str) -> Pair:
    out = x.new_empty(x.shape[0], weight.shape[0])
    return torch.empty_like(out) if keep else x.new_empty(0), out


@_gelu_linear_backward.register_fake
def _(grad: Tensor, weight: Tensor, hidden: Tensor, how: str) -> Triple:
    sums = hidden.new_empty(hidden.shape[1], dtype=torch.promote_types(grad.dtype, torch.float32))
    return torch.empty_like(hidden), torch.empty_like(hidden), sums
