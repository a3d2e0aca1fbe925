"""``Linear``: ``nn.Linear`` through `ops.linear`, and in 8-bit floats where ``fp8`` is set; ``Linear32`` of float32."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from vjepa_fast.layers import fp8
from vjepa_fast.ops.linear import linear, linear_gelu
from vjepa_fast.ops.product import linear32


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


class Linear32(nn.Linear):
    """``nn.Linear`` through `ops.linear32`: float32 whatever the dtype of its input, by tensor cores on a GPU."""

    def forward(self, input: Tensor) -> Tensor:
        """[...,in_features] -> [...,out_features]."""
        return linear32(input, self.weight, self.bias)
