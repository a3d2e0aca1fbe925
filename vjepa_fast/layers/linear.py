"""``Linear``: ``nn.Linear`` through `ops.linear`, and in 8-bit floats where ``fp8`` is set."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from vjepa_fast.layers import fp8
from vjepa_fast.ops.linear import linear, linear_gelu


class Linear(nn.Linear):
    """``nn.Linear`` through ``linear``; parameters, initialisation and state dict are the same.

    ``fp8`` set to True takes the product of `layers.fp8` instead.
    """

    fp8 = False

    def forward(self, input: Tensor) -> Tensor:
        """[...,in_features] -> [...,out_features]."""
        return (fp8.linear if self.fp8 else linear)(input, self.weight, self.bias)

    def gelu(self, x: Tensor) -> Tensor:
        """``F.gelu(self(x))`` (exact GELU)."""
        return F.gelu(self(x)) if self.fp8 else linear_gelu(x, self.weight, self.bias)
