"""The whole frozen evaluation of one checkpoint: its encoders beside the same architecture with random weights."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace

import numpy as np
import torch

from vjepa_fast.config.schema import Config
from vjepa_fast.data.manifests.manifest import Manifest, load_manifest
from vjepa_fast.errors import DataError, UserError
from vjepa_fast.evaluation.choices import check_choice
from vjepa_fast.evaluation.extract.clips import Source
from vjepa_fast.evaluation.extract.features import Features
from vjepa_fast.evaluation.extract.tokens import Tokens, extract_tokens
from vjepa_fast.evaluation.probes import PROBES, ProbeOptions
from vjepa_fast.evaluation.probes.published import published_settings
from vjepa_fast.evaluation.run.encoders import WHICH, Say, encoders_of
from vjepa_fast.evaluation.run.rows import Row, against, episode_rows, probe_row
from vjepa_fast.evaluation.run.sources import FeatureSettings, open_sources, suite_name
from vjepa_fast.evaluation.tasks import Task, check_manifests, get_task
from vjepa_fast.models.vit import VisionTransformer

PROBE_PROTOCOLS = ("vjepa_fast", "published")


@dataclass(frozen=True)
class ProbeProtocol:
    """How features are taken and read; every encoder of a comparison has the same.

    ``name`` "published" replaces pooling, level, frames and probes as `probes.published` has them.
    ``task`` gives frames, step, views and epochs where they are None. ``probes``: names in `PROBES`.
    """

    pooling: str = "time"
    level: str = "last"
    probes: tuple[str, ...] = ("linear", "knn")
    batch_size: int = 16
    num_frames: int | None = None  # None: as the encoder was trained
    crop_size: int | None = None
    frame_step: int | None = None
    images: str = "repeat"
    way: int = 5
    shots: tuple[int, ...] = (1, 5)
    queries: int = 15
    episodes: int = 1000
    seed: int = 0
    workers: int = 0
    name: str = "vjepa_fast"
    task: str | None = None
    clips: int | None = None  # views of probes that read tokens; None: the task's, else one
    crops: int | None = None
    epochs: int | None = None  # of probes that train by steps; None: the task's
    probe_batch: int = 64
    storage: str = "bfloat16"  # of tokens
    short: str | None = None  # "hold" repeats the last frame of short videos (set by a task), "refuse" leaves them out

    def settled(self) -> ProbeProtocol:
        """With everything that the task and the published protocol say filled in.

        Raises:
            ConfigError: an unknown probe, task or protocol. UserError: the published probe without its protocol.
        """
        check_choice("protocol", self.name, PROBE_PROTOCOLS)
        task = self.known_task
        if self.name == "published":
            p = published_settings(task)
            return replace(
                self,
                pooling=p.pooling,
                level=p.level,
                probes=("published",),
                short=p.short,
                frame_step=None,
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
            short=self.short or ("hold" if task else None),
        )

    @property
    def known_task(self) -> Task | None:
        """The task that ``task`` names."""
        return get_task(self.task) if self.task else None

    @property
    def features(self) -> FeatureSettings:
        """How pooled features are taken."""
        spread = "whole" if self.name == "published" else None
        own = {f.name: getattr(self, f.name) for f in fields(FeatureSettings) if f.name != "spread"}
        return FeatureSettings(**own, spread=spread)


def probe_checkpoint(
    path: str | os.PathLike,
    *,
    train: str | None = None,
    test: str | None = None,
    val: str | None = None,
    fewshot: str | None = None,
    which: Sequence[str] = WHICH,
    protocol: ProbeProtocol = ProbeProtocol(),
    config: Config | None = None,
    random: bool = True,
    device: str | torch.device = "cpu",
    cache_dir: str | os.PathLike | None = None,
    on_progress: Say | None = None,
) -> list[Row]:
    """Rows of the encoders in a checkpoint file or run folder, first the random-init control.

    ``train``, ``val``, ``test``: manifests of a probe (``val`` None: 20 % of train is held out); ``fewshot``: a
    manifest of classes for episodes. ``config``: for files that hold none. ``on_progress`` gets a line of text before
    each part.

    Raises:
        UserError: a missing or damaged checkpoint, another architecture, unreadable manifests, too few samples, label
            gaps, other classes than the task's.
    """
    protocol = protocol.settled()
    probing = bool(train and test)
    if not probing and not fewshot:
        raise UserError("nothing to measure: give --train and --test manifests, or --fewshot")
    given = {"train": train, "val": val, "test": test, "fewshot": fewshot}
    manifests = {k: load_manifest(v) for k, v in given.items() if v}
    classes = check_manifests(manifests, protocol.known_task) if probing else None
    for part in ("train", "test"):
        if part in manifests and len(np.unique(manifests[part].labels)) < 2:
            raise DataError(f"{manifests[part].path}: a probe needs at least two classes")
    say = on_progress or (lambda text: None)
    encoders = encoders_of(path, which, config=config, random=random, say=say)
    sources = open_sources(manifests, encoders[0][2], protocol.features, say)
    extraction = _Extraction(protocol, manifests, sources, device, cache_dir, say)
    rows = []
    for label, kind, encoder in encoders:
        encoder.to(device)
        options = ProbeOptions(
            seed=protocol.seed,
            classes=classes,
            task=protocol.known_task,
            epochs=protocol.epochs,
            batch_size=protocol.probe_batch,
            device=device,
            on_progress=lambda i, n, label=label: say(f"{label}: probe, epoch {i} of {n}"),
        )
        taken: dict[str, dict] = {}
        for name in protocol.probes if probing else ():
            needs = PROBES[name].needs
            if needs not in taken:
                given = [part for part in ("train", "val", "test") if part in manifests]
                taken[needs] = {part: extraction.take(needs, label, encoder, part) for part in given}
            say(f"{label}: {name} probe")
            parts = taken[needs]["train"], taken[needs].get("val"), taken[needs]["test"]
            rows.append(probe_row(name, *parts, options, label=label, kind=kind, suite=suite_name(manifests["test"])))
        if "fewshot" in manifests:
            rows += episode_rows(
                label,
                kind,
                f"{suite_name(manifests['fewshot'])} few-shot",
                extraction.features(label, encoder, "fewshot"),
                **{k: getattr(protocol, k) for k in ("way", "shots", "queries", "episodes", "seed")},
            )
    return against(rows, [r for r in rows if r.kind == "random"])


@dataclass(frozen=True)
class _Extraction:
    """Features and tokens of the parts, for one encoder after the other."""

    protocol: ProbeProtocol
    manifests: Mapping[str, Manifest]
    sources: Mapping[str, Source]
    device: str | torch.device
    cache_dir: str | os.PathLike | None
    say: Say

    def take(self, needs: str, label: str, encoder: VisionTransformer, part: str) -> Features | Tokens:
        return (self.tokens if needs == "tokens" else self.features)(label, encoder, part)

    def features(self, label: str, encoder: VisionTransformer, part: str) -> Features:
        source = self.sources[part]
        self.say(f"{label}: features of {part} ({len(source)} clips)")
        return self.protocol.features.take(encoder, source, self.device, self.cache_dir)

    def tokens(self, label: str, encoder: VisionTransformer, part: str) -> Tokens:
        p = self.protocol
        views = (p.clips or 1, p.crops or 1)
        source = self.sources[part] if views == (1, 1) else self.manifests[part]
        self.say(f"{label}: tokens of {part} ({len(source)} clips)")
        shared = {k: v for k, v in vars(p.features).items() if k not in ("pooling", "spread")}
        where = {"device": self.device, "cache_dir": self.cache_dir}
        return extract_tokens(encoder, source, clips=views[0], crops=views[1], storage=p.storage, **shared, **where)
