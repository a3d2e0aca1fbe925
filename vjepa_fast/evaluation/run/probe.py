"""The whole frozen evaluation of one checkpoint: its encoders beside the same architecture with random weights."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from vjepa_fast.data.manifests.manifest import Manifest, load_manifest
from vjepa_fast.data.manifests.root import Root
from vjepa_fast.errors import DataError, UserError
from vjepa_fast.evaluation.choices import check_choice
from vjepa_fast.evaluation.extract.clips import Source, clip_view
from vjepa_fast.evaluation.extract.shards import check_disk
from vjepa_fast.evaluation.extract.tokens import Tokens, extract_tokens, token_bytes
from vjepa_fast.evaluation.probes import PROBES, ProbeOptions
from vjepa_fast.evaluation.probes.published import published_parts, published_settings
from vjepa_fast.evaluation.readout.probing import Reading
from vjepa_fast.evaluation.run.encoders import Subject
from vjepa_fast.evaluation.run.readout import AUTO, probe_features, with_reading
from vjepa_fast.evaluation.run.rows import Row, against, episode_rows, probe_row
from vjepa_fast.evaluation.run.sources import FeatureSettings, open_sources, suite_name
from vjepa_fast.evaluation.tasks import Task, check_manifests, get_task
from vjepa_fast.models.vit import VisionTransformer

PROBE_PROTOCOLS = ("vjepa_fast", "published")


@dataclass(frozen=True)
class ProbeProtocol(FeatureSettings):
    """How features and tokens are taken and read; every encoder of a comparison has the same.

    ``name`` "published" replaces pooling, level, frames, geometry and probes as `probes.published` has them; ``row``
    names the published run whose epochs are taken, ``every_clip`` draws no clips where the published script does.
    ``task`` gives frames, step, views and epochs where they are None. ``probes``: names in `PROBES`.
    """

    probes: tuple[str, ...] = ("linear", "knn")
    way: int = 5
    shots: tuple[int, ...] = (1, 5)
    queries: int = 15
    episodes: int = 1000
    seed: int = 0
    name: str = "vjepa_fast"
    task: str | None = None
    clips: int | None = None  # views of probes that read tokens; None: the task's, else one
    crops: int | None = None
    epochs: int | None = None  # of probes that train by steps; None: the task's
    probe_batch: int | None = None  # None: the published protocol's, else 64
    storage: str | None = None  # of tokens; None: the published protocol's, else bfloat16
    row: str | None = None
    every_clip: bool = False
    readout: str | None = None  # "auto" or a name, of probes of pooled features; None: ``pooling`` and ``level``

    def settled(self) -> ProbeProtocol:
        """With everything that the task and the published protocol say filled in.

        Raises:
            ConfigError: an unknown probe, task or protocol. UserError: the published probe without its protocol.
        """
        check_choice("protocol", self.name, PROBE_PROTOCOLS)
        if self.readout not in (None, AUTO):
            Reading.from_name(self.readout)
        task = self.known_task
        if self.name == "published":
            p = published_settings(task, self.row)
            return replace(
                self,
                pooling="mean",
                level=p.level,
                probes=("published",),
                short=p.short,
                spread=p.spread,
                geometry=p.geometry,
                precision=p.precision,
                frame_step=None,
                clips=1,
                crops=1,
                probe_batch=self.probe_batch or p.batch_size,
                storage=self.storage or p.storage,
                num_frames=self.num_frames or p.num_frames,
                epochs=self.epochs or p.epochs,
            )
        for name in self.probes:
            PROBES.get_named(name, "probes")
        if "published" in self.probes:
            raise UserError("--probes published: give --protocol published, which also takes features as published")
        return replace(
            self,
            num_frames=self.num_frames or (task.num_frames if task else None),
            frame_step=self.frame_step or (task.frame_step if task else None),
            clips=self.clips or (task.clips if task else 1),
            crops=self.crops or (task.crops if task else 1),
            epochs=self.epochs or (task.epochs if task else 20),
            probe_batch=self.probe_batch or 64,
            storage=self.storage or "bfloat16",
            short=self.short or ("hold" if task else None),
        )

    @property
    def known_task(self) -> Task | None:
        """The task that ``task`` names."""
        return get_task(self.task) if self.task else None

    def take_tokens(self, encoder: VisionTransformer, source: Source, subject: Subject) -> Tokens:
        """The tokens of all views of ``source``; after `settled`."""
        own = {**self.extraction(), **{k: getattr(self, k) for k in ("clips", "crops", "storage")}}
        return extract_tokens(encoder, source, device=subject.device, cache_dir=subject.cache_dir, **own)

    def parts(self, manifests: Mapping[str, Manifest]) -> dict[str, Manifest]:
        """The manifests that are trained and tested on: as they are, but for the published protocol."""
        if self.name != "published":
            return dict(manifests)
        return published_parts(manifests, published_settings(self.known_task), self.every_clip)

    def token_bytes(self, encoder: VisionTransformer, samples: int) -> int:
        """Bytes of the tokens of all views of ``samples`` samples; after `settled`."""
        view = clip_view(encoder, self.num_frames, self.crop_size, self.frame_step)
        views, storage = (self.clips or 1) * (self.crops or 1), self.storage or "bfloat16"
        return samples * token_bytes(encoder, view, views, self.level, storage)


def probe_checkpoint(
    path: str | os.PathLike,
    *,
    train: str | None = None,
    test: str | None = None,
    val: str | None = None,
    fewshot: str | None = None,
    root: str | None = None,
    protocol: ProbeProtocol = ProbeProtocol(),
    **how: Any,
) -> list[Row]:
    """Rows of the encoders in a checkpoint file or run folder, first the random-init control.

    ``train``, ``val``, ``test``: manifests of a probe (``val`` None: 20 % of train is held out); ``fewshot``: a
    manifest of classes for episodes; ``root``: the folder their paths start from and stay in. ``how``: fields of
    `Subject`.

    Raises:
        UserError: a missing or damaged checkpoint, another architecture, unreadable manifests, too few samples, label
            gaps, other classes than the task's.
    """
    subject, protocol = Subject(path, **how), protocol.settled()
    given = {"train": train, "val": val, "test": test, "fewshot": fewshot}
    manifests = protocol.parts({k: load_manifest(v, Root.given(root)) for k, v in given.items() if v})
    probing = {"train", "test"} <= set(manifests)
    if not probing and not fewshot:
        raise UserError("nothing to measure: give --train and --test manifests, or --fewshot")
    classes = check_manifests(manifests, protocol.known_task) if probing else None
    for part in ("train", "test"):
        if part in manifests and len(np.unique(manifests[part].labels)) < 2:
            raise DataError(f"{manifests[part].path}: a probe needs at least two classes")
    encoders = subject.encoders()
    if probing and any(PROBES[name].needs_of(protocol.known_task) == "tokens" for name in protocol.probes):
        samples = sum(len(m) for part, m in manifests.items() if part != "fewshot")
        needed = len(encoders) * protocol.token_bytes(encoders[0][2], samples)
        subject.say(f"tokens of {samples} clips and {len(encoders)} encoders: {needed / 1e9:.1f} GB")
        if subject.cache_dir is not None:
            check_disk(subject.cache_dir, needed)
    sources = open_sources(manifests, encoders[0][2], protocol, subject)
    rows = []
    for label, kind, encoder in encoders:
        if probing:
            rows += encoder_rows(label, kind, encoder, manifests, sources, protocol, subject, classes)
        if "fewshot" in manifests:
            suite = f"{suite_name(manifests['fewshot'])} few-shot"
            episodes = {k: getattr(protocol, k) for k in ("way", "shots", "queries", "episodes", "seed")}
            subject.say(f"{label}: features of fewshot ({len(sources['fewshot'])} clips)")
            features = protocol.take(encoder.to(subject.device), sources["fewshot"], subject)
            rows += episode_rows(label, kind, suite, features, **episodes)
    return against(rows, [r for r in rows if r.kind == "random"])


def encoder_rows(
    label: str,
    kind: str,
    encoder: VisionTransformer,
    manifests: Mapping[str, Manifest],
    sources: Mapping[str, Source],
    protocol: ProbeProtocol,
    subject: Subject,
    classes: int | None = None,
    suite: str | None = None,
) -> list[Row]:
    """A row per probe of a settled ``protocol``, of one encoder on the parts "train", "val" (optional) and "test".

    ``sources``: the same parts as `open_sources` gives them; several views are read from ``manifests``. ``subject``
    gives device, cache folder and progress. ``classes``: how many there must be (None: the highest label + 1).
    """
    encoder.to(subject.device)
    options = ProbeOptions(
        seed=protocol.seed,
        classes=classes,
        task=protocol.known_task,
        epochs=protocol.epochs,
        batch_size=protocol.probe_batch,
        device=subject.device,
        on_progress=lambda i, n: subject.say(f"{label}: probe, epoch {i} of {n}"),
    )

    def take(needs: str, part: str) -> Any:
        several_views = needs == "tokens" and (protocol.clips, protocol.crops) != (1, 1)
        source = manifests[part] if several_views else sources[part]
        subject.say(f"{label}: {needs} of {part} ({len(source)} clips)")
        return (protocol.take_tokens if needs == "tokens" else protocol.take)(encoder, source, subject)

    needs_of = {name: PROBES[name].needs_of(protocol.known_task) for name in protocol.probes}
    pooled = [name for name, needs in needs_of.items() if needs == "features"]
    rows, taken, read = [], {}, {}
    if protocol.readout is not None and pooled:
        subject.say(f"{label}: readout {protocol.readout}")
        read = probe_features(protocol.readout, pooled, encoder, sources, protocol, subject, options)
    for name, needs in needs_of.items():
        if name not in read and needs not in taken:
            taken[needs] = {part: take(needs, part) for part in ("train", "val", "test") if part in manifests}
        found, reading = read[name] if name in read else (taken[needs], None)
        subject.say(f"{label}: {name} probe")
        parts = found["train"], found.get("val"), found["test"]
        row = probe_row(name, *parts, options, label=label, kind=kind, suite=suite or suite_name(manifests["test"]))
        rows.append(with_reading(row, reading))
    return rows
