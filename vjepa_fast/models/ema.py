"""The target encoder: an exponential moving average of the encoder."""
from __future__ import annotations

import torch
from torch import nn


@torch.no_grad()
def ema_update(target: nn.Module, source: nn.Module, momentum: float) -> None:
    """target <- momentum * target + (1 - momentum) * source, in place, for all parameters; buffers are copied.

    Batched over parameters and without a host sync. A parameter equal to its source stays so to the last bit.
    """
    old, new = list(target.parameters()), list(source.parameters())
    if len(old) != len(new):
        raise ValueError(f"ema_update: target has {len(old)} parameters, source {len(new)}")
    torch._foreach_lerp_(old, new, 1.0 - momentum)
    for a, b in zip(target.buffers(), source.buffers()):
        a.copy_(b)
