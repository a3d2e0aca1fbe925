"""The few-shot methods that train, by name."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

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


# Options of the methods by name, as the command line has them.
OPTIONS = (
    *("trunk", "tune_epochs", "tune_lr", "tune_batch", "tune_chunk"),
    *("meta_epochs", "meta_steps", "meta_lr", "meta_way", "meta_shot", "meta_queries", "val_way", "val_queries"),
    *("flip", "top_k", "background"),  # of sun and sun-d; left out for others
)


def settings_of(method: str, given: Mapping[str, Any], **test: Any) -> TuneSettings:
    """The settings of ``method`` with ``given`` values of `OPTIONS` (missing or None: the method's own).

    ``test``: further fields of ``TuneSettings``, such as ``way``, ``shots``, ``queries``, ``episodes``, ``pooling``.
    With another number of epochs, warm-up and milestones keep their share of the run. Raises ConfigError for values
    that cannot be used.
    """
    default: Any = method_named(method)[1]()

    def of(**names: str) -> dict[str, Any]:
        return {field: given[name] for field, name in names.items() if given.get(name) is not None}

    meta = of(**{n.removeprefix("meta_"): n for n in OPTIONS if n.startswith(("meta_", "val_"))})
    if "way" in meta:
        meta["reduce_way"] = False  # asked for by name: refused rather than reduced
    fit = of(epochs="tune_epochs", lr="tune_lr", batch_size="tune_batch")
    fields = {"meta": replace(default.meta, **meta), **of(trunk="trunk", chunk="tune_chunk"), **test}
    is_sun = isinstance(default, SunSettings)
    for stage in ("teacher", "student") if is_sun else ("classifier",):
        own = getattr(default, stage)
        share = fit.get("epochs", own.epochs) / own.epochs
        milestones = tuple(round(m * share) for m in own.milestones)
        fields[stage] = replace(own, warmup=own.warmup * share, milestones=milestones, **fit)
    if is_sun:
        fields |= of(top_k="top_k", background="background")
        if given.get("flip") is not None:
            fields["augment"] = replace(default.augment, flip=given["flip"])
    return replace(default, **fields)


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
