"""Readouts of the encoders in a checkpoint: chosen for each by one rule, or given for all."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from vjepa_fast.data.manifests.manifest import Manifest
from vjepa_fast.errors import ConfigError
from vjepa_fast.evaluation.extract.clips import Source
from vjepa_fast.evaluation.extract.features import Features, extract_poolings, poolings_of
from vjepa_fast.evaluation.fewshot.protocols import EPISODE_PROTOCOLS, EpisodeProtocol
from vjepa_fast.evaluation.probes import ProbeOptions
from vjepa_fast.evaluation.readout import Choice, Readout, Transform, choose, fit
from vjepa_fast.evaluation.readout.choice import validation_rule
from vjepa_fast.evaluation.readout.probing import Reading, choose_reading
from vjepa_fast.evaluation.run.encoders import Subject
from vjepa_fast.evaluation.run.fewshot import check_episodes
from vjepa_fast.evaluation.run.rows import Row, against, readout_rows
from vjepa_fast.evaluation.run.sources import AS_TRAINED, FeatureSettings, open_sources, suite_name
from vjepa_fast.evaluation.tasks import check_apart
from vjepa_fast.models.vit import VisionTransformer

AUTO = "auto"


def readout_checkpoint(
    path: str | os.PathLike,
    novel: Manifest,
    base: Manifest | None = None,
    val: Manifest | None = None,
    *,
    readout: str = AUTO,
    protocol: EpisodeProtocol = EPISODE_PROTOCOLS["action"],
    settings: FeatureSettings = AS_TRAINED,
    **how: Any,
) -> tuple[list[Row], dict[str, Choice]]:
    """(rows, choices by encoder) of the encoders in a checkpoint file or run folder, first the random-init control.

    ``readout``: "auto", chosen for each encoder on ``val`` (`choose`), or the name of one for all. ``base``: manifest
    of base classes. ``settings`` but for pooling and level, which the readout has. ``how``: fields of `Subject`.

    Raises:
        ConfigError: "auto" without base or validation classes, an unknown readout, one that needs base classes without.
        DataError: parts that share files, too few classes or samples, before any feature is taken.
        CheckpointError: as `Subject.encoders`.
    """
    subject, given = Subject(path, **how), None if readout == AUTO else Readout.from_name(readout)
    manifests = {"base": base, "val": val if given is None else None, "novel": novel}
    if given is None and (base is None or val is None):
        missing = " and ".join(f"--{part}" for part in ("base", "val") if manifests[part] is None)
        raise ConfigError(
            f"--readout auto: chooses on validation classes what base clips fit; give {missing}, or name a readout"
        )
    if given is not None and base is None and given.fitted:
        raise ConfigError(f"--readout {given.name}: it is fitted on base clips; give --base")
    parts = {part: manifest for part, manifest in manifests.items() if manifest is not None}
    check_apart(parts)
    check_episodes(novel, protocol)
    if "val" in parts:
        validation_rule(parts["val"], 1, protocol.seed)
    encoders = subject.encoders()
    sources = open_sources(parts, encoders[0][2], settings, subject)
    taking = _taking(settings, subject)
    rows, choices = [], {}
    for label, kind, encoder in encoders:
        encoder.to(subject.device)
        fitted_on = sources.get("base")
        if given is None:
            subject.say(f"{label}: choosing a readout on {len(sources['val'])} validation clips")
            choice = choose(encoder, sources["base"], sources["val"], seed=protocol.seed, **taking)
        else:
            subject.say(f"{label}: {given.name}")
            choice = fit(encoder, given, fitted_on, seed=protocol.seed, **taking)
        choices[label] = choice
        subject.say(f"{label}: {protocol.episodes:,} episodes of {len(sources['novel'])} novel clips")
        suite = suite_name(novel) + " few-shot"
        rows += readout_rows(label, kind, suite, encoder, choice, sources["novel"], protocol, **taking)
    return against(rows, [r for r in rows if r.kind == "random"]), choices


def _taking(settings: FeatureSettings, subject: Subject) -> dict[str, Any]:
    own = {k: v for k, v in settings.extraction().items() if k != "level"}
    return {**own, "device": subject.device, "cache_dir": subject.cache_dir}


def probe_features(
    readout: str,
    probes: Sequence[str],
    encoder: VisionTransformer,
    sources: Mapping[str, Source],
    settings: FeatureSettings,
    subject: Subject,
    options: ProbeOptions,
) -> dict[str, tuple[dict[str, Features], Reading]]:
    """For each of ``probes``: its features of the parts "train", "val" (optional) and "test", and how they are read.

    "auto": each probe chooses on its validation part. Every part passes through the encoder once.
    """
    taking = _taking(settings, subject)
    if readout == AUTO:
        keys = poolings_of(encoder)
    else:
        keys = [Reading.from_name(readout).key]
    banks = {
        part: extract_poolings(encoder, sources[part], keys, **taking) for part in ("train", "val") if part in sources
    }
    if readout == AUTO:
        chosen = {name: choose_reading(name, banks["train"], banks.get("val"), options) for name in probes}
    else:
        chosen = dict.fromkeys(probes, Reading.from_name(readout))
    needed = list(dict.fromkeys(reading.key for reading in chosen.values()))
    banks["test"] = extract_poolings(encoder, sources["test"], needed, **taking)
    found = {}
    for name, reading in chosen.items():
        change = Transform.fit(reading.transform, banks["train"][reading.key])
        found[name] = {part: change(bank[reading.key]) for part, bank in banks.items()}, reading
    return found


def with_reading(row: Row, reading: Reading | None) -> Row:
    """``row`` with how its features were read among what was chosen."""
    return row if reading is None else replace(row, chosen={**row.chosen, **reading.to_dict()})
