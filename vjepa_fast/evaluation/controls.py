"""What a pretrained encoder is held against: random weights, raw pixels, and a small supervised model.

Shapes: n samples, B batch, F frames.
"""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from vjepa_fast.config.schema import Config
from vjepa_fast.errors import TrainingError
from vjepa_fast.evaluation.extract.clips import ClipSet, Source, clip_batches
from vjepa_fast.evaluation.extract.features import Features, encode, pool_tokens
from vjepa_fast.evaluation.probes import ProbeResult, result_of
from vjepa_fast.evaluation.tasks import check_labels, check_within
from vjepa_fast.models.interop import clip_settings
from vjepa_fast.models.vit import VisionTransformer


def random_encoder(config: Config, seed: int | None = None) -> VisionTransformer:
    """The encoder of ``config`` with the weights that ``seed`` draws, in eval mode, untrained.

    With the default, the config's own seed, these are the weights that a run of ``config`` starts from.
    ``clip_settings`` are those that a run of ``config`` would store. The caller's random state is left alone.
    """
    from vjepa_fast import models

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed if seed is None else seed)
        encoder = models.encoder_from_config(config)
    encoder.clip_settings = clip_settings(config)
    return encoder.eval()


def pixel_features(
    source: Source,
    *,
    frames: int = 4,
    size: int = 8,
    num_frames: int = 16,
    crop_size: int = 64,
    batch_size: int = 64,
    workers: int = 0,
) -> Features:
    """The clip itself as features: averaged down to ``frames`` x ``size`` x ``size`` x RGB in [0, 1], flattened.

    ``source``: a data.Manifest (read at ``num_frames`` and ``crop_size``) or a ClipSet (taken as it is). d = 3 frames
    size^2.
    """
    rows, labels = [], []
    for clip, label in clip_batches(source, batch_size, {"num_frames": num_frames, "crop_size": crop_size}, workers):
        small = nn.functional.adaptive_avg_pool3d(clip.float() / 255, (min(frames, clip.shape[2]), size, size))
        rows.append(small.flatten(1))
        labels.append(label)
    return Features(torch.cat(rows).numpy(), torch.cat(labels).numpy(), source.name)


@dataclass
class Supervised:
    """A supervised model after training: the encoder, its linear head, and how it came out."""

    encoder: VisionTransformer
    head: nn.Module
    result: ProbeResult | None  # on the test part, if one was given
    val_accuracy: float
    losses: list[float]


def _shift(clip: Tensor, generator: torch.Generator, most: int = 4) -> Tensor:
    """One random translation by up to ``most`` pixels per batch: keeps direction, order, shape and colour."""
    dy, dx = (int(torch.randint(-most, most + 1, (), generator=generator)) for _ in range(2))
    size = clip.shape[-1]
    rows = (torch.arange(clip.shape[-2]) + dy).clamp(0, clip.shape[-2] - 1)
    cols = (torch.arange(size) + dx).clamp(0, size - 1)
    return clip[..., rows, :][..., cols]


@torch.no_grad()
def _predict(encoder: VisionTransformer, head: nn.Module, clips: ClipSet, pooling: str) -> np.ndarray:
    out, device = [], next(encoder.parameters()).device
    for clip, _ in clip_batches(clips, 64, {}):
        z, grid = encode(encoder, clip.to(device))
        out.append(head(pool_tokens(z.float(), grid, pooling)).argmax(1).cpu())
    return torch.cat(out).numpy()


def train_supervised(
    encoder: VisionTransformer,
    train: ClipSet,
    val: ClipSet,
    test: ClipSet | None = None,
    *,
    steps: int = 200,
    batch_size: int = 16,
    lr: float = 1e-3,
    weight_decay: float = 0.05,
    warmup: float = 0.1,
    pooling: str = "mean",
    checks: int = 4,
    seed: int = 0,
    device: str | torch.device = "cpu",
) -> Supervised:
    """Train ``encoder`` (changed in place) and a linear head from scratch with cross-entropy, for a small supervised
    row.

    AdamW, linear warm-up and cosine to 0, gradient norm at most 1, random shifts. The weights with the best of
    ``checks`` validation accuracies are kept; the test part is read once, with those. Raises DataError for empty parts,
    label gaps and labels that ``train`` does not have, TrainingError for a loss that is not finite.
    """
    device = torch.device(device)
    classes = check_labels(train.labels, train.name)
    for part in (val,) if test is None else (val, test):
        check_within(part.labels, part.name, classes)
    generator = torch.Generator().manual_seed(seed)
    encoder.to(device).train()
    with torch.no_grad():
        z, grid = encode(encoder, train.clips[:1].to(device))
        width = pool_tokens(z, grid, pooling).shape[1]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        head = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, classes)).to(device)
    parameters = [p for p in [*encoder.parameters(), *head.parameters()] if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=lr, weight_decay=weight_decay)
    first = max(1, int(warmup * steps))
    labels = torch.as_tensor(train.labels)
    best, losses = -1.0, []
    kept = encoder.state_dict(), head.state_dict()  # replaced at the last step at the latest
    order = torch.empty(0, dtype=torch.int64)
    for step in range(steps):
        if len(order) < min(batch_size, len(labels)):
            order = torch.randperm(len(labels), generator=generator)
        rows, order = order[:batch_size], order[batch_size:]
        cosine = 0.5 * (1 + math.cos(math.pi * (step - first) / max(1, steps - first)))
        rate = (step + 1) / first if step < first else cosine
        for group in optimizer.param_groups:
            group["lr"] = lr * rate
        clip = _shift(train.clips[rows], generator).to(device)
        z, grid = encode(encoder, clip)
        loss = nn.functional.cross_entropy(head(pool_tokens(z.float(), grid, pooling)), labels[rows].to(device))
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        losses.append(loss.item())
        if not math.isfinite(losses[-1]):
            raise TrainingError(f"{train.name}: the supervised loss is {losses[-1]} in step {step + 1}; lower lr")
        if (step + 1) % max(1, steps // checks) == 0 or step + 1 == steps:
            encoder.eval()
            accuracy = float((_predict(encoder, head, val, pooling) == val.labels).mean())
            encoder.train()
            if accuracy > best:
                best, kept = accuracy, copy.deepcopy((encoder.state_dict(), head.state_dict()))
    encoder.load_state_dict(kept[0])
    head.load_state_dict(kept[1])
    encoder.eval()
    chosen = {"steps": steps, "batch_size": batch_size, "lr": lr, "pooling": pooling, "val_accuracy": best}
    result = None if test is None else result_of(_predict(encoder, head, test, pooling), test.labels, chosen)
    return Supervised(encoder, head, result, best, losses)
