"""The copy of the target encoder in the dtype it computes in; it follows the moving average."""

from __future__ import annotations

import copy

import torch
from torch import nn


class LowCopy:
    """A module that computes what ``module`` computes under autocast to ``dtype``, without its casts of the weights.

    Kept in ``dtype``: weights and biases of the Linear and Conv3d layers, which autocast would cast at every use, to
    the same bits. Everything else (LayerNorm, whose statistics and affine map autocast leaves in float32; position and
    modality embeddings) is the very parameter of ``module``, not a copy. Call ``copy`` under the same autocast.

    Attributes:
        copy: the module to call; no parameter of it takes gradient. Its tensors keep their addresses for good, so a
            captured CUDA graph may read them.
        low, full: the parameters in ``dtype`` and those of ``module`` that they follow, in one order.
    """

    def __init__(self, module: nn.Module, dtype: torch.dtype):
        self.low: list[torch.Tensor] = []
        self.full: list[torch.Tensor] = []
        shared = {id(p): p for p in (*module.parameters(), *module.buffers())}  # deepcopy takes these as they are
        self.copy = copy.deepcopy(module, shared)
        for layer in self.copy.modules():
            if isinstance(layer, nn.Linear | nn.Conv3d):
                for name, p in list(layer.named_parameters(recurse=False)):
                    self.full.append(p)
                    self.low.append(nn.Parameter(p.detach().to(dtype), requires_grad=False))
                    setattr(layer, name, self.low[-1])

    @torch.no_grad()
    def refresh(self) -> None:
        """Follow ``module``, whose parameters were changed in place: one batched copy, no host sync."""
        torch._foreach_copy_(self.low, self.full)  # pyright: ignore[reportPrivateImportUsage]  # it has no public name
