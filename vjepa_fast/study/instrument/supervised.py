"""Encoders trained with labels: what a suite, a size and a readout allow at best.

Shapes: n clips, B batch, F frames, S pixels, N tokens, E embed_dim.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from vjepa_fast.errors import TrainingError
from vjepa_fast.evaluation.extract.features import amp
from vjepa_fast.models.vit import VisionTransformer


@dataclass(frozen=True)
class Schedule:
    """How an encoder is trained with labels: AdamW, linear warm-up, cosine to zero, gradient norm at most 3.

    ``keep``: share of a clip's tokens that the encoder sees in a step, drawn anew for every clip (fewer are faster).
    ``zoom``: smallest side of a random square crop, as a share of the clip's. ``smoothing``: of the labels.
    """

    steps: int = 600
    batch: int = 96
    lr: float = 2e-3
    weight_decay: float = 0.04
    warmup: float = 0.1
    keep: float = 0.625
    zoom: float = 0.775
    smoothing: float = 0.1


def train_with_labels(
    encoder: VisionTransformer,
    clips: Tensor,
    labels: np.ndarray,
    schedule: Schedule,
    *,
    seed: int = 0,
    snapshot: int | None = None,
    on_step: Callable[[int, float], None] = lambda step, loss: None,
) -> VisionTransformer | None:
    """Train ``encoder`` (in place) and a linear head on the mean token of its last level by cross-entropy.

    Args:
        encoder: of the clips' size; a new one, on the device that it is trained on (CUDA: under autocast to bfloat16).
        clips: uint8 ``[n, 3, F, S, S]``.
        labels: int64 ``[n]`` or, for labels of several factors, ``[n, factors]``; any integers.
        schedule: see there.
        seed: of head, order, crops and kept tokens.
        snapshot: return a copy of the encoder as it is after so many steps.
        on_step: called with the number of steps done and the loss.

    Raises:
        TrainingError: the loss is not finite.
    """
    generator = torch.Generator().manual_seed(seed)
    device = next(encoder.parameters()).device
    columns = [np.unique(column, return_inverse=True)[1] for column in labels.reshape(len(labels), -1).T]
    targets = torch.from_numpy(np.stack(columns, 1))
    widths = [int(column.max()) + 1 for column in columns]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        head = nn.Sequential(nn.LayerNorm(encoder.embed_dim), nn.Linear(encoder.embed_dim, sum(widths))).to(device)
    parameters = [p for p in [*encoder.parameters(), *head.parameters()] if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=schedule.lr, weight_decay=schedule.weight_decay)
    tokens = math.prod(encoder.built_grid)
    kept = max(1, round(schedule.keep * tokens))
    order, copied = torch.empty(0, dtype=torch.int64), None
    encoder.train()
    for step in range(schedule.steps):
        if len(order) < schedule.batch:
            order = torch.cat([order, torch.randperm(len(clips), generator=generator)])
        rows, order = order[: schedule.batch], order[schedule.batch :]
        for group in optimizer.param_groups:
            group["lr"] = schedule.lr * _rate(step, schedule)
        clip = _normalised(_cropped(clips[rows], schedule.zoom, generator), encoder).to(device)
        ids = None
        if kept < tokens:
            ids = torch.rand(len(rows), tokens, generator=generator).argsort(1)[:, :kept].sort(1).values.to(device)
        with amp(device):
            logits = head(encoder(clip, ids, hierarchical=False).mean(1)).float().split(widths, 1)
        losses = [
            functional.cross_entropy(out, target, label_smoothing=schedule.smoothing)
            for out, target in zip(logits, targets[rows].T.to(device), strict=True)
        ]
        loss = torch.stack(losses).sum()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 3.0)
        optimizer.step()
        if not math.isfinite(loss.item()):
            raise TrainingError(f"the supervised control's loss is {loss.item()} in step {step + 1}; lower its lr")
        on_step(step + 1, loss.item())
        if step + 1 == snapshot:
            copied = copy.deepcopy(encoder).eval()
    encoder.eval()
    return copied


def _rate(step: int, schedule: Schedule) -> float:
    first = max(1, round(schedule.warmup * schedule.steps))
    if step < first:
        return (step + 1) / first
    return 0.5 * (1 + math.cos(math.pi * (step - first) / max(1, schedule.steps - first)))


def _cropped(clips: Tensor, zoom: float, generator: torch.Generator) -> Tensor:
    """A random square crop of each clip, at least ``zoom`` of its side, scaled back: float ``[B, 3, F, S, S]``
    in 0..1.
    """
    number, _, _, _, size = clips.shape
    pixels = clips.float() / 255
    if zoom >= 1:
        return pixels
    side = zoom + (1 - zoom) * torch.rand(number, generator=generator)
    shift = (2 * torch.rand(number, 2, generator=generator) - 1) * (1 - side)[:, None]
    theta = torch.zeros(number, 2, 3)
    theta[:, 0, 0] = theta[:, 1, 1] = side
    theta[:, :, 2] = shift
    grid = functional.affine_grid(theta, [number, 1, size, size], align_corners=False)
    return functional.grid_sample(pixels.flatten(1, 2), grid, align_corners=False, padding_mode="reflection").view(
        pixels.shape
    )


def _normalised(pixels: Tensor, encoder: VisionTransformer) -> Tensor:
    mean, std = (torch.tensor(value).view(1, 3, 1, 1, 1) for value in (encoder.mean, encoder.std))
    return (pixels - mean) / std
