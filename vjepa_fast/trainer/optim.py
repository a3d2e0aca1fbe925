"""AdamW over every trainable module, with the published parameter groups."""
from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import nn

from vjepa_fast.config.schema import OptimizationConfig


def parameter_groups(modules: Mapping[str, nn.Module], weight_decay: float) -> list[dict]:
    """Two groups per module that has parameters: first all that decay, then all that do not (biases and 1-d).

    The order (encoder, predictor, heads; then the same without decay) is that of the published optimiser.
    """
    decayed, excluded = [], []
    for name, module in modules.items():
        split: tuple[list, list] = ([], [])
        for key, p in module.named_parameters():
            if p.requires_grad:
                split["bias" in key or p.ndim <= 1].append(p)
        if split[0]:
            decayed.append({"params": split[0], "name": name, "WD_exclude": False, "weight_decay": weight_decay})
        if split[1]:
            excluded.append({"params": split[1], "name": name, "WD_exclude": True, "weight_decay": 0.0})
    return decayed + excluded


def build_optimizer(
    modules: Mapping[str, nn.Module], cfg: OptimizationConfig, device: torch.device
) -> torch.optim.AdamW:
    """AdamW (arXiv:1711.05101), fused where torch has a fused kernel for the device."""
    return torch.optim.AdamW(
        parameter_groups(modules, cfg.weight_decay),
        lr=cfg.lr,
        betas=tuple(cfg.betas),
        eps=cfg.eps,
        fused=device.type in ("cpu", "cuda") or None,
    )


def set_schedule(optimizer: torch.optim.Optimizer, lr: float, weight_decay: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = lr
        if not group["WD_exclude"]:
            group["weight_decay"] = weight_decay


def parameters(optimizer: torch.optim.Optimizer) -> list[nn.Parameter]:
    """All parameters in the optimiser's order, which is the same in every process."""
    return [p for group in optimizer.param_groups for p in group["params"]]


def gradient_norm(params: Iterable[nn.Parameter]) -> torch.Tensor:
    """L2 norm over all gradients, a 0-d float32 tensor on their device (no sync)."""
    grads = [p.grad for p in params if p.grad is not None]
    if not grads:
        return torch.zeros(())
    return torch.nn.utils.get_total_norm(grads)
