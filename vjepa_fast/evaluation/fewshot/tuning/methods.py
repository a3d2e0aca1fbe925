"""The few-shot methods that train, by name."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch

from vjepa_fast.errors import ConfigError
from vjepa_fast.evaluation.choices import check_choice
from vjepa_fast.evaluation.extract.clips import Source
from vjepa_fast.evaluation.extract.features import Features
from vjepa_fast.evaluation.fewshot.tuning.embedder import TuneResult
from vjepa_fast.evaluation.fewshot.tuning.meta_baseline import MetaBaselineSettings, meta_baseline
from vjepa_fast.evaluation.fewshot.tuning.settings import TuneSettings
from vjepa_fast.evaluation.fewshot.tuning.sun import SunDSettings, SunSettings, sun
from vjepa_fast.evaluation.intervals import mean_ci95
from vjepa_fast.models.vit import VisionTransformer

METHODS: dict[str, tuple[Callable[..., TuneResult], type[TuneSettings]]] = {
    "meta-baseline": (meta_baseline, MetaBaselineSettings),
    "sun": (sun, SunSettings),
    "sun-d": (sun, SunDSettings),
}


def method_named(name: str) -> tuple[Callable[..., TuneResult], type[TuneSettings]]:
    """(function, its settings) of a method; ConfigError for another name."""
    check_choice("few-shot method", name, METHODS)
    return METHODS[name]


def tune(
    method: str,
    encoder: VisionTransformer | None,
    base: Source | Features,
    val: Source | Features | None,
    novel: Source | Features,
    *,
    settings: TuneSettings | None = None,
    seed: int = 0,
    device: str | torch.device = "cpu",
    interval: Callable = mean_ci95,
    on_progress: Callable[[str], None] | None = None,
) -> TuneResult:
    """Tune a copy of ``encoder`` on ``base`` classes, choose the epoch on ``val``, measure on ``novel``.

    ``method``: "meta-baseline", "sun" (SUN-M) or "sun-d", with ``settings`` of its kind (None: the papers' values).
    Parts are ClipSets, data.Manifests or, for "meta-baseline" without an encoder, Features; see ``meta_baseline`` and
    ``sun`` for what each does and raises. ``interval(accuracies) -> (mean, half-width)``: of the test, as
    ``EpisodeProtocol.ci95``.
    """
    function, kind = method_named(method)
    if settings is not None and type(settings) is not kind:
        raise ConfigError(f"{method}: settings must be {kind.__name__}, got {type(settings).__name__}")
    result = function(
        encoder, base, val, novel, settings=settings or kind(), seed=seed, device=device, on_progress=on_progress
    )
    for by_shot in result.test.values():
        by_shot.update({shot: replace(r, ci95=interval(r.accuracies)[1]) for shot, r in by_shot.items()})
    return result
