"""SUN (arXiv:2203.07057) on video: a teacher labels every tubelet of a clip for its student, then Meta-Baseline.

Shapes: B clips, N tokens (tubelets) of grid (T, H, W), D token width, C base classes; class C is the background.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vjepa_fast import ops
from vjepa_fast.errors import ConfigError, DataError
from vjepa_fast.evaluation.extract.cache import normalisation
from vjepa_fast.evaluation.extract.clips import Source
from vjepa_fast.evaluation.extract.features import Features, amp
from vjepa_fast.evaluation.fewshot.tuning.augment import Augment, paired_views
from vjepa_fast.evaluation.fewshot.tuning.embedder import Embedder, TuneResult, build_embedder, new_head, trained
from vjepa_fast.evaluation.fewshot.tuning.meta_baseline import fit, look, meta_stage, train_classifier
from vjepa_fast.evaluation.fewshot.tuning.metric import COSINE, EmdMetric, Metric
from vjepa_fast.evaluation.fewshot.tuning.parts import Part, parts_of
from vjepa_fast.evaluation.fewshot.tuning.settings import PLAIN, FitSettings, MetaSettings, Setup, TuneSettings
from vjepa_fast.models.vit import VisionTransformer

POOLINGS = ("mean", "time")  # linear in the tokens: a classifier of the pooled feature is one of each token as well
# Of the released code; there lr is per 512 samples of a batch.
TEACHER = FitSettings(300, 512, "adamw", 5e-4, weight_decay=0.05, schedule="cosine", warmup=5)
STUDENT = FitSettings(800, 512, "adamw", 5e-4, weight_decay=0.05, schedule="cosine", warmup=5)
SUN_M = MetaSettings(
    epochs=100, steps=100, episodes_per_step=8, way=10, shot=1, queries=5, milestones=(20, 40, 60, 80), reduce_way=True
)


@dataclass(frozen=True)
class SunSettings(TuneSettings):
    """The three stages. ``background``: tubelets of a clip, of lowest confidence, that are labelled background;
    ``still``: so are those whose motion is below this share of the clip's largest (0: none).
    """

    meta: MetaSettings = SUN_M
    teacher: FitSettings = TEACHER
    student: FitSettings = STUDENT
    augment: Augment = Augment()
    location_weight: float = 0.5
    top_k: int = 5
    smoothing: float = 0.1
    background: int = 10
    still: float = 0.05
    method: ClassVar[str] = "sun"

    @property
    def metric(self) -> Metric:
        """What the meta stage and all tests compare by."""
        return COSINE

    def __post_init__(self):
        super().__post_init__()
        if self.pooling not in POOLINGS:
            raise ConfigError(f"sun: pooling {self.pooling!r}; accepted: {', '.join(POOLINGS)}")


# fewer episodes than SUN-M's: each has way x way x queries linear programmes
SUN_D = replace(SUN_M, steps=50, episodes_per_step=2, way=5, temperature=12.5, val_queries=5, val_episodes=50)


@dataclass(frozen=True)
class SunDSettings(SunSettings):
    """SUN-D: the same stages, with DeepEMD's metric (`EmdMetric`, ``nodes`` as there) in the last one and all tests."""

    meta: MetaSettings = SUN_D
    nodes: tuple[int, int, int] = (2, 2, 2)
    method: ClassVar[str] = "sun-d"

    @property
    def metric(self) -> Metric:
        """The earth mover's distance."""
        return EmdMetric(self.nodes)


# ---------------------------------------------------------------- labels and loss


def background_tokens(logits: Tensor, saliency: Tensor | None = None, *, lowest: int = 10, still: float = 0.05):
    """Which tubelets are background: bool ``[B, N]``.

    The ``lowest`` ones of each clip by confidence, the largest of the teacher's logits ``[B, N, C]``, and those whose
    ``saliency`` (float ``[B, N]`` in [0, 1], ``ops.motion_saliency``) is below ``still``; a clip without any motion
    is judged by confidence alone. Raises ConfigError unless 0 <= ``lowest`` < N.
    """
    if not 0 <= lowest < logits.shape[1]:
        raise ConfigError(f"sun: background {lowest} of {logits.shape[1]} tubelets; expected fewer than all")
    order = logits.amax(-1).argsort(dim=1, stable=True)
    chosen = torch.zeros(logits.shape[:2], dtype=torch.bool, device=logits.device)
    chosen.scatter_(1, order[:, :lowest], True)
    if saliency is not None:
        chosen |= (saliency < still) & (saliency.amax(1, keepdim=True) > 0)
    return chosen


def soft_labels(logits: Tensor, background: Tensor, *, top_k: int = 5, smoothing: float = 0.1) -> Tensor:
    """Labels ``[B, N, C + 1]`` of tubelets from the teacher's logits ``[B, N, C]`` and bool ``background`` ``[B, N]``.

    Every class has ``smoothing`` / C; the ``top_k`` largest of a tubelet, or class C of a background one, have
    1 - ``smoothing`` more. They do not sum to 1, as published. Raises ConfigError unless 1 <= ``top_k`` < C.
    """
    classes = logits.shape[-1]
    if not 1 <= top_k < classes:
        raise ConfigError(f"sun: top_k {top_k} with {classes} base classes; expected 1 to {classes - 1}")
    off = smoothing / classes
    labels = logits.new_full((*logits.shape[:2], classes + 1), off)
    objects = labels.scatter(-1, logits.topk(top_k, dim=-1).indices, 1 - smoothing + off)
    labels[..., classes] = 1 - smoothing + off
    return torch.where(background[..., None], labels, objects)


def location_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean over tubelets of the cross-entropy of logits ``[B, N, C + 1]`` with soft ``labels`` of that shape."""
    return -(labels * logits.log_softmax(-1)).sum(-1).mean()


def token_logits(head: nn.Linear, z: Tensor, grid: tuple[int, int, int], pooling: str) -> Tensor:
    """The answers of a linear ``head`` of pooled features for each token of ``z`` ``[B, N, D]``: ``[B, N, C]``.

    Their mean over all tokens is the head's answer for the clip: class activation maps (arXiv:1512.04150). With
    pooling "time" a token meets the part of the head that reads its time step.
    """
    if pooling == "mean":
        return head(z)
    weight_TCD = head.weight.unflatten(1, (grid[0], -1)).transpose(0, 1)
    z_TBSD = z.unflatten(1, (grid[0], -1)).transpose(0, 1)
    out_TBSC = grid[0] * torch.einsum("tbsd,tcd->tbsc", z_TBSD, weight_TCD) + head.bias
    return out_TBSC.transpose(0, 1).flatten(1, 2)


# ---------------------------------------------------------------- training


@torch.no_grad()
def label_clips(teacher: Embedder, head: nn.Linear, weak: Tensor, settings: SunSettings) -> Tensor:
    """The teacher's soft labels ``[B, N, C + 1]`` of the tubelets of ``weak`` views uint8 ``[B, 3, F, S, S]``."""
    with amp(weak.device):
        z, grid = teacher.tokens(weak)
    logits = token_logits(head, z.float(), grid, teacher.pooling)
    mean, std = normalisation(teacher.encoder)
    saliency = ops.motion_saliency(weak, grid, mean, std, mode="area").flatten(1)
    chosen = background_tokens(logits, saliency, lowest=settings.background, still=settings.still)
    return soft_labels(logits, chosen, top_k=settings.top_k, smoothing=settings.smoothing)


def train_student(
    student: Embedder, teacher: Embedder, head: nn.Linear, base: Part, settings: SunSettings, setup: Setup = PLAIN
) -> tuple[list[float], list[float]]:
    """Train ``student`` (in place) on base classes with the global and the location-specific loss.

    The teacher with its ``head`` sees a weak view of each clip, the student a strong one of the same crop and frames.
    Returns the mean of the whole loss and of the location-specific loss alone, per epoch.
    """
    seed, device, classes = setup.seed, setup.device, base.classes
    own_head = new_head(head.in_features, classes, seed, device)
    with torch.no_grad():
        token_width = student.tokens(base.fetch(np.array([0])).to(device))[0].shape[-1]
    local_head = new_head(token_width, classes + 1, seed + 1, device)
    labels, generator = torch.from_numpy(base.labels), np.random.default_rng(seed)
    location, seen = [], []

    def loss_of(rows: np.ndarray) -> Tensor:
        weak, strong = paired_views(base.fetch(rows), generator, settings.augment)
        soft = label_clips(teacher, head, weak.to(device), settings)
        with amp(device):
            z, grid = student.tokens(strong.to(device))
            logits, local = own_head(student.pooled(z, grid)), local_head(z)
        local_loss = location_loss(local.float(), soft)
        seen.append((local_loss.detach(), len(rows)))
        return F.cross_entropy(logits.float(), labels[rows].to(device)) + settings.location_weight * local_loss

    def closed() -> None:
        location.append(float(sum(value * n for value, n in seen) / sum(n for _, n in seen)))
        seen.clear()

    parameters = [*trained(student), *own_head.parameters(), *local_head.parameters()]
    return fit(parameters, len(labels), settings.student, loss_of, setup, "student", closed), location


def sun(
    encoder: VisionTransformer,
    base: Source | Features,
    val: Source | Features | None,
    novel: Source | Features,
    *,
    settings: SunSettings = SunSettings(),
    seed: int = 0,
    device: str | torch.device = "cpu",
    on_progress: Callable[[str], None] | None = None,
) -> TuneResult:
    """SUN-M of ``encoder`` (copied, not changed), or SUN-D with `SunDSettings`: teacher and student on ``base``,
    meta-tuning of the student with its best epoch on ``val``, test on ``novel``.

    ``base``, ``val``, ``novel``: ClipSets or manifests; ``val`` None sets base classes aside. Teacher and student both
    start from ``encoder``. Deterministic for a seed on a CPU. Raises DataError (also: features, which have no
    tubelets), ConfigError (also: ``top_k`` not below the number of base classes, ``background`` not below the number
    of tubelets, a pooling that is not linear, more ``nodes`` than tokens) and TrainingError.
    """
    setup = Setup(settings.chunk, seed, torch.device(device), on_progress)
    parts, notes = parts_of(encoder, base, val, novel, settings, seed)
    base_part = parts[0]
    if base_part.features:
        raise DataError(f"base part {base_part.name}: sun labels tubelets and needs clips; features have none")
    teacher, student = (build_embedder(encoder, base_part, settings, setup.device, per_token=True) for _ in range(2))
    with torch.no_grad():  # refuses top_k, background and nodes before hours of training
        clip = base_part.fetch(np.array([0])).to(setup.device)
        settings.metric.represent(teacher, clip)
        z, _ = teacher.tokens(clip)
        blank = z.new_zeros(1, z.shape[1], base_part.classes)
        soft_labels(blank, background_tokens(blank, lowest=settings.background), top_k=settings.top_k)
    result = TuneResult(settings.method, student, seed, settings, notes, metric=settings.metric)
    look(result, "start", teacher, parts, setup)
    head, result.losses["teacher"] = train_classifier(
        teacher, base_part, settings.teacher, setup, settings.augment, "teacher"
    )
    look(result, "teacher", teacher, parts, setup)
    teacher.eval().requires_grad_(False)
    result.losses["student"], result.losses["location"] = train_student(
        student, teacher, head, base_part, settings, replace(setup, seed=seed + 1)
    )
    meta_stage(result, "student", parts, setup)
    return result
