"""The training loop that all stages on batches share."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor, nn

from vjepa_fast.errors import TrainingError
from vjepa_fast.evaluation.fewshot.tuning.settings import FitSettings, Setup


def fit(
    parameters: list[nn.Parameter],
    samples: int,
    settings: FitSettings,
    loss_of: Callable[[np.ndarray], Tensor],
    setup: Setup,
    what: str,
    on_epoch: Callable[[], None] | None = None,
) -> list[float]:
    """Minimise the mean of ``loss_of(rows)`` over batches of ``samples`` samples; returns the mean loss per epoch.

    A batch above ``setup.chunk`` is taken in portions whose gradients are added: the same step in less memory.

    Raises:
        TrainingError: an epoch's loss is not finite.
    """
    if settings.optimizer == "sgd":
        optimizer = torch.optim.SGD(
            parameters, lr=settings.lr, momentum=settings.momentum, weight_decay=settings.weight_decay
        )
    else:
        optimizer = torch.optim.AdamW(parameters, lr=settings.lr, weight_decay=settings.weight_decay)
    generator = torch.Generator().manual_seed(setup.seed)
    steps, losses = math.ceil(samples / settings.batch_size), []
    for epoch in range(settings.epochs):
        total = 0.0
        for step, rows in enumerate(torch.randperm(samples, generator=generator).split(settings.batch_size)):
            for group in optimizer.param_groups:
                group["lr"] = settings.lr * settings.rate(epoch, step, steps)
            optimizer.zero_grad(set_to_none=True)
            for part in rows.split(setup.chunk):
                loss = loss_of(part.numpy()) * (len(part) / len(rows))
                loss.backward()
                total = total + loss.detach().double() * len(rows)
            optimizer.step()
        losses.append(finite_loss(total / samples, what, epoch))
        if on_epoch is not None:
            on_epoch()
        setup.say(f"{what}: epoch {epoch + 1}, loss {losses[-1]:.4f}")
    return losses


def finite_loss(mean: Tensor | float, what: str, epoch: int) -> float:
    """``mean`` as a float; TrainingError where it is NaN or infinite."""
    value = float(mean)
    if not math.isfinite(value):
        raise TrainingError(f"{what}: the loss is {value} in epoch {epoch + 1}; lower lr")
    return value
