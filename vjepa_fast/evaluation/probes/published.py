"""The evaluation behind the published accuracies of arXiv:2605.17165, as its scripts compute them.

Clips: 16 frames over the whole video (``Sampling(spread="whole", short="hold")``), the whole shorter side scaled to the
crop (``data.eval_views(geometry="short_side")``), one view; features of the last level of the EMA target, kept in half
precision. Probe: see `PublishedHead`; AdamW at a constant rate without warm-up; nothing is held out and nothing chosen,
the last epoch is scored. `SETTINGS` has what differs from task to task. It is for comparison with published numbers:
`probes.attentive` is the better evaluation.

Legend: n samples, b of a batch, N tokens, D width, C classes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vjepa_fast.data.manifests.manifest import Manifest
from vjepa_fast.errors import DataError, TrainingError
from vjepa_fast.evaluation.choices import check_choice
from vjepa_fast.evaluation.extract.features import Features
from vjepa_fast.evaluation.extract.tokens import Tokens, from_array
from vjepa_fast.evaluation.probes.probe import PROBES, Probe, ProbeOptions, ProbeResult, check_parts, result_of
from vjepa_fast.evaluation.tasks import Task

ATTENTION_HEADS = 8
DRAW_SEED = 42
ASSUMED = (
    "weights start as PyTorch starts them, but for the cls token (normal, 0.02)",
    "shuffling, which has no seed there, follows --seed",
    "features are taken in bfloat16 on CUDA, in float32 elsewhere, before they are kept in half precision",
)


@dataclass(frozen=True)
class Published:
    """The published settings of a task.

    ``tokens``: "all", or "mean": one, the mean of all. ``head``: "attention" or "linear" (of the mean token).
    ``draw``: how many clips of the training and test list are drawn with seed 42, None: all. ``split``: the share of
    one list that trains, its beginning; the rest tests. ``storage`` and ``precision``: of features as they are kept,
    and as they are computed (None: as everywhere). ``known``: False where nothing is published for the task.
    """

    tokens: str = "all"
    head: str = "attention"
    epochs: int = 100
    lr: float = 1e-3
    weight_decay: float = 0.01
    batch_size: int = 16
    level: str = "last"
    num_frames: int = 16
    spread: str = "whole"
    short: str = "hold"
    geometry: str = "short_side"
    storage: str = "float16"
    precision: str | None = None
    draw: tuple[int, int] | None = None
    split: float | None = None
    known: bool = True


SETTINGS = {
    "diving48": Published(),
    "ssv2": Published(tokens="mean"),
    "imagenet100": Published(tokens="mean", head="linear", epochs=50, batch_size=256),
    "ucf101": Published(lr=3e-4, draw=(2000, 500)),
    "motion8": Published(lr=3e-4, batch_size=32, geometry="native", storage="float32", precision="float32", split=0.8),
}
OTHER = Published(known=False)  # Diving-48's
HALF_AS_LONG = ("mixed_4gpu_fwm_ld", "mixed_4gpu_hw_ld", "mixed_4gpu_fwm_hw_ld")  # 50 epochs on Diving-48 and SSv2


def published_settings(task: Task | None, row: str | None = None) -> Published:
    """The published settings of a task; Diving-48's where none are published.

    ``row``: a published run, such as ``mixed_4gpu_fwm_ld``, whose probes may have had other epochs (50, not 100).
    """
    found = SETTINGS.get(task.name, OTHER) if task else OTHER
    halved = row in HALF_AS_LONG and task is not None and task.name in ("diving48", "ssv2")
    return replace(found, epochs=50) if halved else found


def published_parts(manifests: Mapping[str, Manifest], settings: Published, every: bool = False) -> dict[str, Manifest]:
    """``manifests`` by part with the clips that the published evaluation trains and tests on; "val" is left out.

    A task with a ``split`` has one list, "train", of which the rest becomes "test"; with both given they stay.
    ``every``: no clips are drawn (the second published script of UCF-101). The published draw is not known beyond its
    seed, so these are as many clips, and not the same ones. Drawn clips keep the order of the list.
    """
    parts = {part: m for part, m in manifests.items() if part != "val"}
    if settings.split is not None and "train" in parts and "test" not in parts:
        whole = parts["train"]
        count = int(settings.split * len(whole))
        parts |= {"train": _some(whole, np.arange(count)), "test": _some(whole, np.arange(count, len(whole)))}
    if settings.draw is not None and not every:
        generator = np.random.default_rng(DRAW_SEED)
        for part, count in zip(("train", "test"), settings.draw):
            if part in parts and len(parts[part]) > count:
                parts[part] = _some(parts[part], np.sort(generator.permutation(len(parts[part]))[:count]))
    return parts


def _some(manifest: Manifest, rows: np.ndarray) -> Manifest:
    return replace(manifest, paths=[manifest.paths[i] for i in rows], labels=manifest.labels[rows])


class PublishedHead(nn.Module):
    """The published probe: tokens ``[b, N, D]`` -> logits ``[b, C]``.

    "attention": a learnt cls token before the tokens, one ``nn.MultiheadAttention`` with 8 heads over all of them
    without positions, residual, LayerNorm, a linear classifier of the cls token. Only the cls token's query is
    computed: nothing reads the output of the others. "linear": a linear classifier of the mean token. Weights depend
    on ``seed`` alone. A width that 8 does not divide has fewer attention heads.
    """

    def __init__(self, width: int, classes: int, head: str = "attention", seed: int = 0):
        super().__init__()
        check_choice("head of the published probe", head, ("attention", "linear"))
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.attention: nn.MultiheadAttention | None = None
            if head == "attention":
                heads = next(h for h in range(ATTENTION_HEADS, 0, -1) if width % h == 0)
                self.cls = nn.Parameter(torch.empty(1, 1, width).normal_(std=0.02))
                self.attention = nn.MultiheadAttention(width, heads, batch_first=True)
                self.norm = nn.LayerNorm(width)
            self.linear = nn.Linear(width, classes)

    def forward(self, x_bND: Tensor) -> Tensor:
        """Logits ``[b, C]`` of tokens ``[b, N, D]``."""
        if self.attention is None:
            return self.linear(x_bND.mean(1))
        cls_b1D = self.cls.expand(len(x_bND), -1, -1)
        all_bMD = torch.cat([cls_b1D, x_bND], 1)
        read_b1D, _ = self.attention(cls_b1D, all_bMD, all_bMD, need_weights=False)
        return self.linear(self.norm(cls_b1D + read_b1D)[:, 0])


def _tokens_of(part: Features | Tokens, settings: Published) -> Tokens:
    """The part as one token per sample where it is pooled, rounded as it would have been kept."""
    if isinstance(part, Tokens):
        if part.views != (1, 1):
            raise DataError(f"{part.name}: the published probe reads one view, got {part.views[0]} x {part.views[1]}")
        return part
    part.check_finite()
    with np.errstate(over="ignore"):
        x = part.x.astype(np.float16).astype(np.float32) if settings.storage == "float16" else part.x
    if not np.isfinite(x).all():
        raise DataError(
            f"{part.name}: features are too large for float16, in which the published evaluation keeps them"
        )
    return from_array(x[:, None], part.y, part.name)


def published_probe(
    train: Features | Tokens,
    test: Features | Tokens,
    settings: Published = OTHER,
    *,
    classes: int | None = None,
    epochs: int | None = None,
    batch_size: int | None = None,
    seed: int = 0,
    device: str | torch.device = "cpu",
    on_progress: Callable[[int, int], None] | None = None,
) -> ProbeResult:
    """Train the published probe on all of ``train`` and score it on ``test`` after the last epoch.

    Features are mean-pooled, ``[n, D]``: one token per sample. Tokens (one view) are read batch by batch from where
    they lie, memory or disk; ``settings.tokens`` "mean" averages them. ``epochs`` and ``batch_size`` override the
    published numbers. ``chosen`` holds the settings, "selection": "none", and what had to be assumed. Deterministic
    on a CPU. DataError as `check_parts`, TrainingError where the loss is not finite.
    """
    shown, asked = _tokens_of(train, settings), _tokens_of(test, settings)
    classes = check_parts({"train": shown, "test": asked}, classes)
    epochs, batch_size = epochs or settings.epochs, batch_size or settings.batch_size
    model = PublishedHead(train.dim, classes, settings.head, seed).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=settings.lr, weight_decay=settings.weight_decay)

    def fetch(part: Tokens, rows: np.ndarray) -> Tensor:
        x_bND = part.rows(rows)[:, 0].to(device).float()
        return x_bND.mean(1, keepdim=True) if settings.tokens == "mean" else x_bND

    for epoch in range(epochs):
        order, total = np.random.default_rng((seed, epoch)).permutation(len(shown)), 0.0
        for start in range(0, len(order), batch_size):
            rows = order[start : start + batch_size]
            loss = F.cross_entropy(model(fetch(shown, rows)), torch.from_numpy(shown.y[rows]).to(device))
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            total = total + loss.detach() * len(rows)
        if not np.isfinite(float(total)):
            raise TrainingError(f"{train.name}: the published probe diverged in epoch {epoch + 1}")
        if on_progress:
            on_progress(epoch + 1, epochs)
    with torch.no_grad():
        parts = np.array_split(np.arange(len(asked)), -(-len(asked) // batch_size))
        predicted = np.concatenate([model(fetch(asked, rows)).argmax(-1).cpu().numpy() for rows in parts])
    chosen = {
        "lr": settings.lr,
        "wd": settings.weight_decay,
        "epochs": epochs,
        "batch": batch_size,
        "head": settings.head,
        "tokens": 1 if settings.tokens == "mean" else int(np.prod(shown.grid)),
        "selection": "none",
        "assumed": list(ASSUMED) + ([] if settings.known else ["no settings are published for this task: Diving-48's"]),
    }
    return result_of(predicted, asked.y, chosen)


@PROBES.register("published")
class PublishedProbe(Probe):
    """The probe behind the published accuracies; nothing is chosen."""

    needs = "tokens"

    @classmethod
    def needs_of(cls, task: Task | None) -> str:
        """All tokens, or the features that are their mean."""
        return "tokens" if published_settings(task).tokens == "all" else "features"

    def __call__(
        self, train: Features | Tokens, val: object, test: Features | Tokens, options: ProbeOptions
    ) -> ProbeResult:
        """`published_probe` with the settings of the task; the validation part is not used."""
        settings = published_settings(options.task)
        return published_probe(train, test, settings, epochs=options.epochs, **options.training)
