"""Meta-Baseline (arXiv:2003.04390): a classifier on the base classes, its head dropped, then training on episodes.

Shapes: E episodes, W ways, S shots, Q queries per class, M = W*Q, d features, C base classes.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vjepa_fast.errors import TrainingError
from vjepa_fast.evaluation.extract.clips import Source
from vjepa_fast.evaluation.extract.features import Features, amp
from vjepa_fast.evaluation.fewshot.episodes import EpisodeResult, sample_episodes
from vjepa_fast.evaluation.fewshot.tuning.augment import Augment, weak_views
from vjepa_fast.evaluation.fewshot.tuning.embedder import Embedder, TuneResult, build_embedder, embed, new_head, trained
from vjepa_fast.evaluation.fewshot.tuning.metric import COSINE, Metric
from vjepa_fast.evaluation.fewshot.tuning.metric import episode_logits as episode_logits
from vjepa_fast.evaluation.fewshot.tuning.parts import Part, Parts, part_of, parts_of
from vjepa_fast.evaluation.fewshot.tuning.settings import (
    PLAIN,
    FitSettings,
    MetaSettings,
    Setup,
    TuneSettings,
    parse_trunk,
)
from vjepa_fast.models.vit import VisionTransformer


@dataclass(frozen=True)
class MetaBaselineSettings(TuneSettings):
    """Both stages. ``augment`` None: clips as they are, as the released code does on mini-ImageNet."""

    classifier: FitSettings = FitSettings()
    augment: Augment | None = None  # of stage 1


def episode_loss(logits: Tensor) -> Tensor:
    """Mean cross-entropy of logits ``[..., M, W]`` whose queries are in class order, Q of each of the W classes."""
    way = logits.shape[-1]
    truth_M = torch.arange(way, device=logits.device).repeat_interleave(logits.shape[-2] // way)
    return F.cross_entropy(logits.reshape(-1, way), truth_M.repeat(logits.numel() // (way * len(truth_M))))


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
    TrainingError where an epoch's loss is not finite.
    """
    if settings.optimizer == "sgd":
        optimizer = torch.optim.SGD(parameters, settings.lr, settings.momentum, weight_decay=settings.weight_decay)
    else:
        optimizer = torch.optim.AdamW(parameters, settings.lr, weight_decay=settings.weight_decay)
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


def train_classifier(
    model: Embedder,
    base: Part,
    settings: FitSettings,
    setup: Setup = PLAIN,
    augment: Augment | None = None,
    what: str = "classifier",
) -> tuple[nn.Linear, list[float]]:
    """Train ``model`` (changed in place, where it has gradients) and a linear head on the base classes.

    Returns the head ``d -> C`` and the mean cross-entropy per epoch. ``augment``: weak views of clips, drawn by
    the seed.
    """
    seed, device = setup.seed, setup.device
    with torch.no_grad():
        width = model(base.fetch(np.array([0])).to(device)).shape[1]
    head = new_head(width, base.classes, seed, device)
    labels, generator = torch.from_numpy(base.labels), np.random.default_rng(seed)

    def loss_of(rows: np.ndarray) -> Tensor:
        x = base.fetch(rows)
        if augment is not None and not base.features:
            x = weak_views(x, generator, augment)
        with amp(device):
            logits = head(model(x.to(device)))
        return F.cross_entropy(logits.float(), labels[rows].to(device))

    parameters = [*trained(model), *head.parameters()]
    return head, fit(parameters, len(labels), settings, loss_of, setup, what)


def validate(model: Embedder, val: Part, meta: MetaSettings, setup: Setup, metric: Metric = COSINE) -> float:
    """Mean few-shot accuracy on the validation classes, always on the same episodes."""
    features = embed(model, val, setup, metric)
    return metric.episodes(features, meta.val_way, meta.shot, meta.val_queries, meta.val_episodes, seed=0).mean


def look(result: TuneResult, stage: str, model: Embedder, parts: Parts, setup: Setup) -> None:
    """Validation and test of ``model`` as ``stage`` left it; all stages and models meet the same episodes."""
    _, val, novel = parts
    result.validation[stage] = [validate(model, val, result.settings.meta, setup, result.metric)]
    result.test[stage] = novel_episodes(model, novel, result.settings, setup, result.metric)


def novel_episodes(
    model: Embedder, novel: Part, settings: TuneSettings, setup: Setup, metric: Metric = COSINE
) -> dict[int, EpisodeResult]:
    """EpisodeResult by shots on the novel classes; the episodes depend on labels and seed alone."""
    features, s = embed(model, novel, setup, metric), settings
    return {k: metric.episodes(features, s.way, k, s.queries, s.episodes, setup.seed) for k in s.shots}


def meta_train(
    model: Embedder, base: Part, val: Part, meta: MetaSettings, setup: Setup = PLAIN, metric: Metric = COSINE
) -> tuple[list[float], list[float], int, float]:
    """Train ``model`` (in place) on episodes of base classes; it ends with the weights of the best epoch on ``val``.

    Returns (mean loss per epoch, validation accuracy per epoch, best epoch from 1, its temperature); ties go to the
    earlier epoch; without epochs the model stays as it is and the best epoch is 0. The gradient of a step is the mean
    over its episodes. Raises DataError as ``sample_episodes`` and TrainingError on a loss that is not finite.
    """
    device = setup.device
    temperature = nn.Parameter(torch.tensor(float(meta.temperature), device=device))
    parameters = trained(model)
    optimizer = torch.optim.SGD([*parameters, temperature], meta.lr, meta.momentum, weight_decay=meta.weight_decay)
    way = min(meta.way, base.classes) if meta.reduce_way else meta.way
    losses, accuracies, best, kept = [], [], 0, None
    at_once = meta.episodes_per_step if base.features else 1  # clips: an episode at a time, gradients added
    for epoch in range(meta.epochs):
        for group in optimizer.param_groups:
            group["lr"] = meta.lr * meta.gamma ** sum(epoch >= m for m in meta.milestones)
        drawn = sample_episodes(
            base.labels, way, meta.shot, meta.queries, meta.steps * meta.episodes_per_step, _seed(setup.seed, epoch)
        )
        rows_EWK = np.concatenate([drawn.support, drawn.query], axis=2)
        total = 0.0
        for step in range(meta.steps):
            optimizer.zero_grad(set_to_none=True)
            first = step * meta.episodes_per_step
            for start in range(first, first + meta.episodes_per_step, at_once):
                rows = rows_EWK[start : start + at_once]
                with amp(device):
                    z = metric.represent(model, base.fetch(rows.reshape(-1)).to(device))
                z_EWKd = z.float().unflatten(0, rows.shape)
                logits = metric.logits(z_EWKd[:, :, : meta.shot], z_EWKd[:, :, meta.shot :], temperature)
                loss = episode_loss(logits) * (len(rows) / meta.episodes_per_step)
                loss.backward()
                total = total + loss.detach().double()
            optimizer.step()
        losses.append(finite_loss(total / meta.steps, "meta stage", epoch))
        accuracies.append(validate(model, val, meta, setup, metric))
        if kept is None or accuracies[-1] > accuracies[best - 1]:
            best, kept = epoch + 1, (copy.deepcopy([p.detach() for p in parameters]), float(temperature.detach()))
        setup.say(f"meta: epoch {epoch + 1}, loss {losses[-1]:.4f}, validation {accuracies[-1]:.4f}")
    if kept is None:
        return losses, accuracies, 0, float(meta.temperature)
    with torch.no_grad():
        for parameter, value in zip(parameters, kept[0]):
            parameter.copy_(value)
    return losses, accuracies, best, kept[1]


def _seed(seed: int, epoch: int) -> int:
    """A seed of its own for each epoch's episodes."""
    return int(np.random.SeedSequence([seed, epoch]).generate_state(1)[0])


def meta_baseline(
    encoder: VisionTransformer | None,
    base: Source | Features,
    val: Source | Features | None,
    novel: Source | Features,
    *,
    settings: MetaBaselineSettings = MetaBaselineSettings(),
    seed: int = 0,
    device: str | torch.device = "cpu",
    on_progress: Callable[[str], None] | None = None,
) -> TuneResult:
    """Meta-Baseline of ``encoder`` (copied, not changed): both stages on ``base``, best epoch on ``val``, test on
    ``novel``.

    ``base``, ``val``, ``novel``: ClipSets or manifests, or Features, which train a projection over them and need no
    encoder. With ``trunk="head"`` clips are encoded once. ``val`` None sets base classes aside. Deterministic for a
    seed on a CPU. The novel classes choose nothing. Raises DataError, ConfigError and TrainingError as
    `parts_of`, `build_embedder` and `fit`.
    """
    setup = Setup(settings.chunk, seed, torch.device(device), on_progress)
    parts, notes = parts_of(encoder, base, val, novel, settings, seed)
    model = build_embedder(encoder, parts[0], settings, setup.device)
    if not parts[0].features and parse_trunk(settings.trunk) == "head":
        setup.say("features of the frozen encoder")
        frozen = Embedder(model.encoder, None, settings.pooling, settings.level)
        base_part, val_part, novel_part = (part_of(embed(frozen, p, setup), p.role, None) for p in parts)
        parts = base_part, val_part, novel_part
        if settings.augment is not None:
            notes.append("augment: features of a frozen encoder are taken once, so clips were not varied")
    result = TuneResult("meta-baseline", model, seed, settings, notes)
    look(result, "start", model, parts, setup)
    _, result.losses["classifier"] = train_classifier(model, parts[0], settings.classifier, setup, settings.augment)
    meta_stage(result, "classifier", parts, setup)
    return result


def meta_stage(result: TuneResult, before: str, parts: Parts, setup: Setup) -> None:
    """``meta_train`` of ``result.model``, with validation and test ``before`` (the name of that stage) and after it."""
    model, settings, (base, val, novel) = result.model, result.settings, parts
    look(result, before, model, parts, setup)
    trained_so = meta_train(model, base, val, settings.meta, setup, result.metric)
    losses, accuracies, result.best_epoch, result.temperature = trained_so
    result.losses["meta"], result.validation["meta"] = losses, accuracies
    if result.best_epoch:
        result.test["meta"] = novel_episodes(model, novel, settings, setup, result.metric)
    model.eval().requires_grad_(False)
