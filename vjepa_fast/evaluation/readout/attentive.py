"""A pooling that learns on base classes where to look: one query over the tokens, a linear head on what it reads.

The pooled feature is a weighted mean of the encoder's own tokens, so that labels choose places and no directions.
Shapes: n clips, B batch, N tokens, D width, C classes.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor, nn

from vjepa_fast.evaluation.extract.features import Features

TOKEN_BYTES = 512 * 2**20  # largest token set (float32) that is held in memory for training


@dataclass(frozen=True)
class AttentivePooling:
    """``softmax(LN(z) query) z``: ``query`` float32 ``[D]``, on the CPU."""

    query: Tensor = field(repr=False)

    def __call__(self, z: Tensor) -> Tensor:
        """Tokens ``[B, N, D]`` to ``[B, D]``."""
        return _attend(z, self.query.to(z.device))


def _attend(z: Tensor, query: Tensor) -> Tensor:
    weight = (nn.functional.layer_norm(z, z.shape[-1:]) @ query).softmax(1)
    return (weight.unsqueeze(1) @ z).squeeze(1)


class Collector:
    """The tokens of all batches of a pass (`extract_poolings`), or a note why they are not held.

    ``clips``: how many there will be. ``limit``: bytes that the tokens may take (`TOKEN_BYTES`).
    """

    def __init__(self, clips: int, limit: int | None = None) -> None:
        self.clips, self.limit = clips, TOKEN_BYTES if limit is None else limit
        self.note = ""
        self._batches: list[Tensor] = []
        self._labels: list[Tensor] = []

    def __call__(self, z: Tensor, grid: tuple[int, int, int], labels: Tensor) -> None:
        """Take one batch ``[B, N, D]``."""
        needed = 4 * self.clips * z[0].numel()
        if needed > self.limit:
            self.note = (
                f"attentive pooling left out: the tokens of {self.clips} base clips take {needed / 2**20:.0f} MiB, "
                f"more than {self.limit / 2**20:.0f}"
            )
            return
        self._batches.append(z.cpu())
        self._labels.append(labels)

    def contents(self) -> tuple[Tensor, np.ndarray]:
        """All tokens float32 ``[n, N, D]`` and labels int64 ``[n]``."""
        return torch.cat(self._batches), torch.cat(self._labels).numpy()


class Pooled:
    """Attentive features of all batches of a pass."""

    def __init__(self, pooling: AttentivePooling) -> None:
        self.pooling = pooling
        self._rows: list[Tensor] = []
        self._labels: list[Tensor] = []

    def __call__(self, z: Tensor, grid: tuple[int, int, int], labels: Tensor) -> None:
        """Pool one batch ``[B, N, D]``."""
        self._rows.append(self.pooling(z).cpu())
        self._labels.append(labels)

    def features(self, name: str) -> Features:
        """The features of the whole pass."""
        return Features(torch.cat(self._rows).numpy(), torch.cat(self._labels).numpy(), name)


def train_attentive(
    tokens: Tensor,
    labels: np.ndarray,
    *,
    epochs: int = 20,
    least_steps: int = 150,
    batch_size: int = 64,
    lr: float = 0.02,
    seed: int = 0,
    on_epoch: Callable[[float], None] | None = None,
) -> AttentivePooling:
    """Train the query and a linear head on base classes with cross-entropy; the head is then dropped.

    ``tokens`` float32 ``[n, N, D]``, ``labels`` int ``[n]``, any integers. ``least_steps``: with few clips there are
    more epochs. Adam, cosine to 0; the pooled feature is
    layer-normed before the head. The query starts at 0, where the pooling is the mean. Deterministic for a seed on a
    CPU. ``on_epoch`` gets the mean loss.
    """
    classes, y = np.unique(labels, return_inverse=True)
    y = torch.from_numpy(y.reshape(-1))
    n, _, width = tokens.shape
    per_epoch = math.ceil(n / batch_size)
    epochs = max(epochs, math.ceil(least_steps / per_epoch))
    generator = torch.Generator().manual_seed(seed)
    query = torch.zeros(width, requires_grad=True)
    head = torch.zeros(len(classes), width, requires_grad=True)
    bias = torch.zeros(len(classes), requires_grad=True)
    optimizer = torch.optim.Adam([query, head, bias], lr=lr)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs * per_epoch)
    with torch.enable_grad():
        for _ in range(epochs):
            total = 0.0
            for rows in torch.randperm(n, generator=generator).split(batch_size):
                pooled = nn.functional.layer_norm(_attend(tokens[rows], query), (width,))
                loss = nn.functional.cross_entropy(nn.functional.linear(pooled, head, bias), y[rows])
                optimizer.zero_grad(set_to_none=True)
                loss.backward()
                optimizer.step()
                schedule.step()
                total += loss.item() * len(rows)
            if on_epoch is not None:
                on_epoch(total / n)
    return AttentivePooling(query.detach())
