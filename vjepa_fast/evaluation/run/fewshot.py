"""Few-shot recognition with a checkpoint, frozen or fine-tuned, beside the same architecture with random weights."""

from __future__ import annotations

import os
from dataclasses import replace

from vjepa_fast.errors import ConfigError, DataError
from vjepa_fast.evaluation.extract.features import extract_features
from vjepa_fast.evaluation.fewshot.protocols import PROTOCOLS, EpisodeProtocol
from vjepa_fast.evaluation.fewshot.tune import METHODS, tune, tune_rows
from vjepa_fast.evaluation.fewshot.tuning import TuneResult, TuneSettings, check_counts
from vjepa_fast.evaluation.run.checkpoint import WHICH, Protocol, _sources, encoders_of, suite_name
from vjepa_fast.evaluation.run.rows import Row, against, fewshot_rows
from vjepa_fast.evaluation.tasks import check_apart


def fewshot_checkpoint(
    path: str | os.PathLike,
    novel,
    *,
    base=None,
    protocol: EpisodeProtocol = PROTOCOLS["action"],
    classifier: str = "prototype",
    options: dict | None = None,
    view: Protocol | None = None,
    which: tuple[str, ...] = WHICH,
    config=None,
    random: bool = True,
    device: str = "cpu",
    cache_dir: str | os.PathLike | None = None,
    on_progress=None,
) -> list[Row]:
    """Rows of the encoders in a checkpoint file or run folder, first the random-init control.

    ``novel``, ``base``: data.Manifest of the novel classes, and of base classes, whose mean ``options["center"] ==
    "base"`` takes off. ``options``: center, l2, metric (prototype) or c (logistic). ``view``: how features are taken
    (pooling, level, frames, size, step, images, batch_size, workers); its few-shot fields are not read. The same
    episodes for every encoder. Raises CheckpointError as `probe_checkpoint`, DataError and
    ConfigError as the classifier, before any feature is taken where manifests tell.
    """
    options, view = dict(options or {}), view or Protocol()
    if options.get("center") != "base":
        base = None  # nothing would read its features
    elif base is None:
        raise ConfigError("centring by the base classes needs a manifest of them: --base, or --center shots")
    check_episodes(novel, protocol)
    if base is not None:
        check_apart({"base": base, "novel": novel})  # its mean would show the classifier its queries
    say = on_progress or (lambda text: None)
    encoders = encoders_of(path, which, config=config, random=random, say=say)
    manifests = {"novel": novel, **({"base": base} if base is not None else {})}
    sources = _sources(manifests, encoders[0][2], view, say)
    suite = suite_name(novel) + " few-shot"
    rows = []
    for label, kind, encoder in encoders:
        parts = {}
        for part, source in sources.items():
            say(f"{label}: features of {part} ({len(source.labels)} clips)")
            parts[part] = extract_features(
                encoder.to(device),
                source,
                pooling=view.pooling,
                level=view.level,
                batch_size=view.batch_size,
                device=device,
                cache_dir=cache_dir,
                num_frames=view.num_frames,
                crop_size=view.crop_size,
                frame_step=view.frame_step,
                images=view.images,
                workers=view.workers,
            )
        say(f"{label}: {protocol.episodes:,} episodes")
        centre = {"base": parts["base"]} if "base" in parts else {}
        rows += fewshot_rows(label, kind, suite, parts["novel"], protocol, classifier, **centre, **options)
    return against(rows, [r for r in rows if r.kind == "random"])


def tune_checkpoint(
    path: str | os.PathLike,
    novel,
    base,
    val=None,
    *,
    method: str = "meta-baseline",
    settings: TuneSettings | None = None,
    protocol: EpisodeProtocol = PROTOCOLS["action"],
    view: Protocol | None = None,
    which: tuple[str, ...] = WHICH,
    config=None,
    random: bool = True,
    device: str = "cpu",
    cache_dir: str | os.PathLike | None = None,
    on_progress=None,
) -> tuple[list[Row], dict[str, TuneResult]]:
    """(rows, results by encoder): every encoder of a checkpoint file or run folder tuned by ``method`` on ``base``.

    The rows of each encoder: frozen with cosine prototypes, which is where tuning starts, then one per later stage and
    number of shots, all on the same episodes. The random-init control is tuned as well: it tells what pretraining adds
    to labels and tuning. ``protocol`` gives the test's way, shots, queries, episodes, seed and interval, ``view``
    pooling, level, frames, size and step; these replace those of ``settings``. ``protocol.seed`` is that of training
    too. ``val`` None: some base classes are set aside. Raises, before any feature is taken, DataError where parts share
    files or have too few classes or samples; else as :func:`fewshot_checkpoint` and ``tune.tune``.
    """
    view, say = view or Protocol(), on_progress or (lambda text: None)
    if method not in METHODS:
        raise ConfigError(f"few-shot method {method!r}; accepted: {', '.join(METHODS)}")
    if view.images != "repeat":
        raise ConfigError("tuning takes still images as clips that stand still (images repeat)")
    same = ("way", "shots", "queries", "episodes")
    fields = {k: getattr(protocol, k) for k in same}
    fields |= {k: getattr(view, k) for k in ("pooling", "level", "num_frames", "crop_size", "frame_step", "workers")}
    settings = replace(settings or METHODS[method][1](), **fields)
    manifests = {"base": base, **({"val": val} if val is not None else {}), "novel": novel}
    check_apart(manifests)
    check_counts(base, val, novel, settings)
    common = {"which": which, "config": config, "random": random}
    frozen = fewshot_checkpoint(
        path, novel, protocol=protocol, options={"metric": "cosine"}, view=view, device=device, cache_dir=cache_dir,
        on_progress=say, **common,
    )  # fmt: skip
    encoders = encoders_of(path, say=lambda text: None, **common)
    sources = _sources(manifests, encoders[0][2], view, say)
    rows, results = [], {}
    for label, kind, encoder in encoders:
        results[label] = tune(
            method, encoder, sources["base"], sources.get("val"), sources["novel"], settings=settings,
            seed=protocol.seed, device=device, interval=protocol.ci95,
            on_progress=lambda text, label=label: say(f"{label}: {text}"),
        )  # fmt: skip
        tuned = tune_rows(results[label], label=label, kind=kind, suite=suite_name(novel) + " few-shot")
        rows += [r for r in frozen if r.label == label]
        rows += [
            replace(r, chosen={"protocol": protocol.name, **r.chosen})
            for r in tuned if not r.probe.startswith(f"{method} start")
        ]  # fmt: skip
    return against(rows, [r for r in rows if r.kind == "random"]), results


def check_episodes(manifest, protocol: EpisodeProtocol) -> None:
    """DataError where a manifest has too few classes or samples for the protocol: before features are taken."""
    from vjepa_fast.evaluation.fewshot.episodes import sample_episodes

    try:
        sample_episodes(manifest.labels, protocol.way, max(protocol.shots), protocol.queries, 1, protocol.seed)
    except DataError as error:
        raise DataError(f"{manifest.path}: {error}") from None


def pretraining_manifests(config) -> tuple[list, list[str]]:
    """(manifests, gaps): the data sets that a checkpoint's configuration was trained on, as far as they are here, and a
    line for each that is not.
    """
    from vjepa_fast import data

    if config is None:
        return [], ["the checkpoint holds no configuration that names them"]
    paths = list(config.data.datasets) + (list(config.img_data.datasets) if config.img_data else [])
    found, gaps = [], []
    for path in paths:
        try:
            found.append(data.load_manifest(path))
        except DataError as error:
            gaps.append(f"not checked: the checkpoint names {path}, which cannot be read here ({error})")
    return found, gaps
