"""The first layer of a feed-forward with its GELU, and the product before the gradient of that GELU.

Beside the usual providers there are the ways of `ops.gelu` (``triton``, ``quack``, ``torch``) and ``inductor``, which
is torch.compile with its own templates of products to choose from.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.ops._inputs import Case, E, Inputs, N, forced
from vjepa_fast.ops.gelu import gelu_linear, gelu_linear_backward


def forward(x: Inputs) -> Case:
    tokens, weight = x.randn(x.batch * N, E, seed=1), x.randn(4 * E, E, seed=2) / 28
    bias = x.randn(4 * E, seed=3).float()

    def plain() -> list[Tensor]:
        hidden = F.linear(tokens, weight, bias.to(x.dtype))
        return [hidden, F.gelu(hidden)]

    def ours(how: str) -> list[Tensor]:
        return list(gelu_linear(tokens, weight, bias, True, how))

    return _case("gelu_linear", x, plain, ours)


def backward(x: Inputs) -> Case:
    grad, weight = x.randn(x.batch * N, E, seed=1), x.randn(E, 4 * E, seed=2) / 28
    hidden = x.randn(x.batch * N, 4 * E, seed=3)

    def plain() -> list[Tensor]:
        slope = torch.ops.aten.gelu_backward(grad @ weight, hidden)
        return [slope, F.gelu(hidden), slope.sum(0, dtype=torch.float32)]

    def ours(how: str) -> list[Tensor]:
        return list(gelu_linear_backward(grad, weight, hidden, how))

    return _case("gelu_linear_backward", x, plain, ours)


def _case(name: str, x: Inputs, plain: Callable[[], list[Tensor]], ours: Callable[[str], list[Tensor]]) -> Case:
    @functools.cache
    def compiled() -> Callable[[], list[Tensor]]:
        options = {"max_autotune": True, "max_autotune_gemm_backends": "TRITON", "epilogue_fusion": True}
        return torch.compile(plain, dynamic=False, options=options)

    ways = {how: functools.partial(ours, how) for how in ("triton", "quack", "torch")}
    return Case(
        name,
        f"{x.batch * N}x{E}x{4 * E}",
        {
            "reference": plain,
            "eager": forced("eager", lambda: ours("torch")),
            "fused": lambda: ours("auto"),
            **ways,
            "inductor": lambda: compiled()(),
        },
        compile_=plain,
        atol=1e-4 if x.size == 4 else 5e-2,
    )


CASES = {"gelu_linear": forward, "gelu_linear_backward": backward}
