"""Few-shot recognition with a checkpoint, frozen or fine-tuned, beside the same architecture with random weights."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from vjepa_fast.config.schema import Config
from vjepa_fast.data.manifests.manifest import Manifest, load_manifest
from vjepa_fast.data.manifests.root import Root
from vjepa_fast.errors import ConfigError, DataError
from vjepa_fast.evaluation.fewshot.episodes import sample_episodes
from vjepa_fast.evaluation.fewshot.protocols import EPISODE_PROTOCOLS, EpisodeProtocol
from vjepa_fast.evaluation.fewshot.tuning.embedder import TuneResult
from vjepa_fast.evaluation.fewshot.tuning.methods import method_named, tune
from vjepa_fast.evaluation.fewshot.tuning.metric import COSINE
from vjepa_fast.evaluation.fewshot.tuning.parts import check_counts
from vjepa_fast.evaluation.fewshot.tuning.settings import TuneSettings
from vjepa_fast.evaluation.run.encoders import Subject
from vjepa_fast.evaluation.run.rows import Row, against, fewshot_rows, tune_rows
from vjepa_fast.evaluation.run.sources import AS_TRAINED, FeatureSettings, open_sources, suite_name
from vjepa_fast.evaluation.tasks import check_apart


def fewshot_checkpoint(
    path: str | os.PathLike,
    novel: Manifest,
    *,
    base: Manifest | None = None,
    protocol: EpisodeProtocol = EPISODE_PROTOCOLS["action"],
    classifier: str = "prototype",
    options: Mapping[str, Any] | None = None,
    settings: FeatureSettings = AS_TRAINED,
    **how: Any,
) -> list[Row]:
    """Rows of the encoders in a checkpoint file or run folder, first the random-init control.

    ``novel``, ``base``: data.Manifest of the novel classes, and of base classes, whose mean ``options["center"] ==
    "base"`` takes off. ``options``: center, l2, metric (prototype) or c (logistic). ``settings``: how features are
    taken. ``how``: fields of `Subject`. The same episodes for every encoder.

    Raises:
        CheckpointError: as `Subject.encoders`.
        DataError, ConfigError: as the classifier, before any feature is taken where the manifests suffice.
    """
    subject, options = Subject(path, **how), dict(options or {})
    if options.get("center") != "base":
        base = None  # nothing would read its features
    elif base is None:
        raise ConfigError("centring by the base classes needs a manifest of them: --base, or --center shots")
    check_episodes(novel, protocol)
    if base is not None:
        check_apart({"base": base, "novel": novel})  # its mean would show the classifier its queries
    encoders = subject.encoders()
    manifests = {"novel": novel, **({"base": base} if base is not None else {})}
    sources = open_sources(manifests, encoders[0][2], settings, subject)
    suite = suite_name(novel) + " few-shot"
    rows = []
    for label, kind, encoder in encoders:
        encoder.to(subject.device)
        parts = {}
        for part, source in sources.items():
            subject.say(f"{label}: features of {part} ({len(source)} clips)")
            parts[part] = settings.take(encoder, source, subject)
        subject.say(f"{label}: {protocol.episodes:,} episodes")
        centre = {"base": parts["base"]} if "base" in parts else {}
        rows += fewshot_rows(label, kind, suite, parts["novel"], protocol, classifier, **centre, **options)
    return against(rows, [r for r in rows if r.kind == "random"])


def tune_checkpoint(
    path: str | os.PathLike,
    novel: Manifest,
    base: Manifest,
    val: Manifest | None = None,
    *,
    method: str = "meta-baseline",
    tuning: TuneSettings | None = None,
    protocol: EpisodeProtocol = EPISODE_PROTOCOLS["action"],
    settings: FeatureSettings = AS_TRAINED,
    **how: Any,
) -> tuple[list[Row], dict[str, TuneResult]]:
    """(rows, results by encoder): every encoder of a checkpoint file or run folder tuned by ``method`` on ``base``.

    The rows of each encoder: frozen with cosine prototypes, which is where tuning starts, then one per later stage and
    number of shots, all on the same episodes. The random-init control is tuned as well: the difference is what
    pretraining adds to labels and tuning. ``protocol`` gives the test's way, shots, queries, episodes, seed and
    interval, ``settings`` pooling, level, frames, size and step; these replace those of ``tuning``. ``protocol.seed``
    is that of training too. ``val`` None: some base classes are set aside. ``how``: fields of `Subject`.

    Raises:
        DataError: parts share files or have too few classes or samples, before any feature is taken.
        CheckpointError, ConfigError: as `fewshot_checkpoint` and `tune`.
    """
    subject, default = Subject(path, **how), method_named(method)[1]()
    if settings.images != "repeat":
        raise ConfigError("tuning takes still images as clips that stand still (images repeat)")
    fields = {k: getattr(protocol, k) for k in ("way", "shots", "queries", "episodes")}
    same = ("pooling", "level", "num_frames", "crop_size", "frame_step", "workers")
    fields |= {k: getattr(settings, k) for k in same}
    tuning = replace(tuning or default, **fields)
    manifests = {"base": base, **({"val": val} if val is not None else {}), "novel": novel}
    check_apart(manifests)
    check_counts(base, val, novel, tuning)
    frozen = fewshot_checkpoint(path, novel, options={"metric": "cosine"}, protocol=protocol, settings=settings, **how)
    encoders = replace(subject, on_progress=None).encoders()
    sources = open_sources(manifests, encoders[0][2], settings, subject)
    rows, results = [], {}
    for label, kind, encoder in encoders:
        results[label] = tune(
            method,
            encoder,
            *(sources["base"], sources.get("val"), sources["novel"]),
            settings=tuning,
            seed=protocol.seed,
            device=subject.device,
            interval=protocol.ci95,
            on_progress=lambda text, label=label: subject.say(f"{label}: {text}"),
        )
        tuned = tune_rows(results[label], label=label, kind=kind, suite=suite_name(novel) + " few-shot")
        rows += [r for r in frozen if r.label == label]
        rows += [
            replace(r, chosen={"protocol": protocol.name, **r.chosen})
            for r in tuned
            if not (r.probe.startswith(f"{method} start") and results[label].metric is COSINE)  # the frozen row
        ]
    return against(rows, [r for r in rows if r.kind == "random"]), results


def check_episodes(manifest: Manifest, protocol: EpisodeProtocol) -> None:
    """DataError where a manifest has too few classes or samples for the protocol: before features are taken."""
    try:
        sample_episodes(manifest.labels, protocol.way, max(protocol.shots), protocol.queries, 1, protocol.seed)
    except DataError as error:
        raise DataError(f"{manifest.path}: {error}") from None


def pretraining_manifests(config: Config | None) -> tuple[list[Manifest], list[str]]:
    """(manifests, gaps): the data sets that a checkpoint's configuration was trained on, as far as they are here, and a
    line for each that is not.
    """
    if config is None:
        return [], ["the checkpoint holds no configuration that names them"]
    streams = [config.data, *([config.img_data] if config.img_data else [])]
    found, gaps = [], []
    for path, root in [(path, Root.of(data)) for data in streams for path in data.datasets]:
        try:
            found.append(load_manifest(path, root))
        except DataError as error:
            gaps.append(f"not checked: the checkpoint names {path}, which cannot be read here ({error})")
    return found, gaps
