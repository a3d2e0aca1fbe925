"""Linear layers whose forward product is computed in 8-bit floats (``runtime.fp8``; changes the maths).

Recipe: x and W are each scaled by one number per tensor, such that their largest magnitude becomes that of e4m3 (448),
and rounded to e4m3, anew at every call (arXiv:2209.05433; "dynamic, tensor-wise"). The product accumulates in the fast
mode of the tensor cores and comes out in bfloat16, bias included. The backward pass is the plain one in bfloat16, from
x and W before rounding (a straight-through estimate). Scaling by row rounds a little less; sm_120 lacks that product.
torchao's Float8Linear is the same product with other defaults; it takes the place of `linear.Linear` (and of its GELU),
refuses empty streams and takes seconds to import, so it is not used. Tests hold ours to the formula.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

E4M3 = torch.float8_e4m3fn
LARGEST = 448.0  # of e4m3
CAPABILITY = (8, 9)


def objections(device: torch.device) -> list[str]:
    """Why this device does not support ``linear``; empty where it does."""
    if device.type != "cuda":
        return [f"needs a CUDA device, this run is on {device.type}"]
    found = torch.cuda.get_device_capability(device)
    if found < CAPABILITY:
        name = torch.cuda.get_device_name(device)
        return [f"needs compute capability 8.9 or later, {name} has {found[0]}.{found[1]}"]
    return []


def quantise(x: Tensor) -> tuple[Tensor, Tensor]:
    """x, of any shape and floating dtype, as e4m3 and the float32 [] scale by which that is to be multiplied.

    Elements differ from x by 1/16 of themselves at most, or by 2 ** -10 scales where they are tiny.
    """
    largest = torch.linalg.vector_norm(x.detach(), float("inf"), dtype=torch.float32)  # max |x| in one pass
    scale = largest.clamp(min=1e-12) / LARGEST
    return (x.float() / scale).clamp(-LARGEST, LARGEST).to(E4M3), scale


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x_NI: Tensor, w_OI: Tensor, bias: Tensor | None) -> Tensor:
        (x8, x_scale), (w8, w_scale) = quantise(x_NI), quantise(w_OI)
        ctx.save_for_backward(x_NI.bfloat16(), w_OI)
        ctx.x_dtype, ctx.bias_dtype = x_NI.dtype, None if bias is None else bias.dtype
        return torch._scaled_mm(  # pyright: ignore[reportPrivateImportUsage]  # torch has no public name for it
            x8,
            w8.t(),
            scale_a=x_scale,
            scale_b=w_scale,
            bias=None if bias is None else bias.bfloat16(),
            out_dtype=torch.bfloat16,
            use_fast_accum=True,
        )

    @staticmethod
    def backward(ctx, *grads: Tensor):
        x_NI, w_OI = ctx.saved_tensors
        g = grads[0].bfloat16()
        wants_x, wants_w, wants_b = ctx.needs_input_grad
        dx = (g @ w_OI.bfloat16()).to(ctx.x_dtype) if wants_x else None
        dw = (g.t() @ x_NI).to(w_OI.dtype) if wants_w else None
        return dx, dw, g.sum(0, dtype=torch.float32).to(ctx.bias_dtype) if wants_b else None


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``F.linear`` by the recipe above: x [...,I], weight [O,I], bias [O], any floating dtype -> [...,O] bfloat16.

    I and O must be multiples of 16. Nothing waits for the device.
    """
    if not x.numel():
        return F.linear(x.bfloat16(), weight.bfloat16(), None if bias is None else bias.bfloat16())
    return _Linear.apply(x.reshape(-1, x.shape[-1]), weight, bias).unflatten(0, x.shape[:-1])
