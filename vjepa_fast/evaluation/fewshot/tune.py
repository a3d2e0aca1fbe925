"""One door to the few-shot methods that train."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import torch
from torch import nn

from vjepa_fast.errors import ConfigError
from vjepa_fast.evaluation.fewshot.meta_baseline import MetaBaselineSettings, meta_baseline
from vjepa_fast.evaluation.fewshot.sun import SunSettings, sun
from vjepa_fast.evaluation.fewshot.tuning import TuneResult, TuneSettings
from vjepa_fast.evaluation.intervals import mean_ci95
from vjepa_fast.evaluation.run.rows import Row

METHODS = {"meta-baseline": (meta_baseline, MetaBaselineSettings), "sun": (sun, SunSettings)}


def tune(
    method: str,
    encoder: nn.Module | None,
    base,
    val,
    novel,
    *,
    settings: TuneSettings | None = None,
    seed: int = 0,
    device: str | torch.device = "cpu",
    interval: Callable = mean_ci95,
    on_progress: Callable[[str], None] | None = None,
) -> TuneResult:
    """Tune a copy of ``encoder`` on ``base`` classes, choose the epoch on ``val``, measure on ``novel``.

    ``method``: "meta-baseline" or "sun", with ``settings`` of its kind (None: the papers' values). Parts are ClipSets,
    data.Manifests or, for "meta-baseline" without an encoder, Features; see ``meta_baseline`` and ``sun`` for what
    each does and raises. ``interval(accuracies) -> (mean, half-width)``: of the test, as ``EpisodeProtocol.ci95``.
    """
    if method not in METHODS:
        raise ConfigError(f"few-shot method {method!r}; accepted: {', '.join(METHODS)}")
    function, kind = METHODS[method]
    if settings is not None and not isinstance(settings, kind):
        raise ConfigError(f"{method}: settings must be {kind.__name__}, got {type(settings).__name__}")
    result = function(
        encoder,
        base,
        val,
        novel,
        settings=settings or kind(),
        seed=seed,
        device=device,
        on_progress=on_progress,
    )
    for by_shot in result.test.values():
        by_shot.update({shot: replace(r, ci95=interval(r.accuracies)[1]) for shot, r in by_shot.items()})
    return result


def tune_rows(result: TuneResult, *, label: str, kind: str, suite: str) -> list[Row]:
    """Rows of an accuracy table, one per stage and number of shots; ``probe`` is e.g. "sun meta 5-shot", so that
    ``compare.against`` pairs the same stage of another encoder.
    """
    chosen = {"method": result.method, "trunk": result.settings.trunk, "best_epoch": result.best_epoch}
    chosen |= {"temperature": result.temperature, "notes": list(result.notes)}
    return [
        Row(
            label,
            kind,
            suite,
            f"{result.method} {stage} {shot}-shot",
            r.mean,
            max(0.0, r.mean - r.ci95),
            min(1.0, r.mean + r.ci95),
            r.episodes,
            1 / r.way,
            {**chosen, "way": r.way, "queries": r.queries},
            tuple(None if np.isnan(a) else round(float(a), 6) for a in r.by_sample),
        )
        for stage, by_shot in result.test.items()
        for shot, r in by_shot.items()
    ]
