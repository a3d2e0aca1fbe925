"""The whole frozen evaluation of one checkpoint: its encoders beside the same architecture with random weights."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from vjepa_fast.errors import CheckpointError, DataError, UserError
from vjepa_fast.evaluation.controls import random_encoder
from vjepa_fast.evaluation.extract.features import Features, _view, decode_clips, extract_features
from vjepa_fast.evaluation.extract.tokens import extract_tokens
from vjepa_fast.evaluation.probes.attentive import attentive_probe
from vjepa_fast.evaluation.probes.published import published_probe, published_settings
from vjepa_fast.evaluation.run.rows import Row, against, episode_rows, probe_rows, row_of
from vjepa_fast.evaluation.tasks import check_manifests, get_task

PROTOCOLS = ("vjepa_fast", "published")
WHICH = ("target_encoder", "encoder")
IN_MEMORY = 512 * 2**20  # bytes of decoded clips below which a manifest is decoded once for all encoders


@dataclass(frozen=True)
class Protocol:
    """How features are taken and read; one protocol serves every encoder of a comparison.

    ``name`` "published" replaces pooling, level, frames and probes by those of ``protocol_published``. ``task`` gives
    frames, step, views and epochs where they are None. ``probes``: linear, knn, attentive.
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
    clips: int | None = None  # views of the attentive probe; None: the task's, else one
    crops: int | None = None
    epochs: int | None = None  # of the attentive or the published probe; None: the task's
    probe_batch: int = 64
    storage: str = "bfloat16"  # of tokens
    short: str | None = None  # "hold" repeats the last frame of short videos (set by a task), "refuse" leaves them out

    def settled(self) -> Protocol:
        """With everything that the task and the published protocol say filled in. UserError for unknown names."""
        if self.name not in PROTOCOLS:
            raise UserError(f"unknown protocol {self.name!r}; choose from {', '.join(PROTOCOLS)}")
        task = get_task(self.task) if self.task else None
        if self.name == "published":
            p = published_settings(task)
            return replace(
                self, pooling=p.pooling, level=p.level, probes=("published",), short=p.short, frame_step=None,
                num_frames=self.num_frames or p.num_frames, epochs=self.epochs or p.epochs,
            )  # fmt: skip
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
    def spread(self) -> str | None:
        return "whole" if self.name == "published" else None


def checkpoint_config(path):
    """The configuration inside a checkpoint or run folder; None where the file holds none (FAIR weights)."""
    from vjepa_fast import config
    from vjepa_fast.models.interop import newest_checkpoint, read_checkpoint

    path = Path(path)
    path = newest_checkpoint(path) if path.is_dir() else path
    found = read_checkpoint(path).get("config")
    return None if found is None else config.from_dict(found, source=str(path))


def cache_folder(path) -> Path:
    """Where the features of a checkpoint are kept unless told otherwise: ``features`` in its run folder or beside the
    file.
    """
    path = Path(path)
    if path.is_dir():
        return path / "features"
    return (path.parent.parent if path.parent.name == "checkpoints" else path.parent) / "features"


def encoders_of(path, which: tuple[str, ...] = WHICH, *, config=None, random: bool = True, say=print) -> list[tuple]:
    """(label, kind, encoder) of a checkpoint file or run folder, first the random-init control if ``random``. Of two
    encoders one may be missing, which is said. CheckpointError as :func:`probe_checkpoint`.
    """
    from vjepa_fast import models

    found = config or checkpoint_config(path)
    if random and found is None:
        raise CheckpointError(
            f"{path}: holds no configuration, so the random-init control cannot be built; give --config or --no-random"
        )
    encoders = []
    for name in which:
        try:
            encoders.append((name, "pretrained", models.load_encoder(path, which=name, config=config)))
        except CheckpointError as error:
            if len(which) == 1 or "holds no" not in str(error):
                raise
            say(f"{error}; left out")
    if not encoders:
        raise CheckpointError(f"{path}: holds none of {', '.join(which)}")
    if random:
        encoders.insert(0, ("random init", "random", random_encoder(found)))
    return encoders


def probe_checkpoint(
    path: str | os.PathLike,
    *,
    train: str | None = None,
    test: str | None = None,
    val: str | None = None,
    fewshot: str | None = None,
    which: tuple[str, ...] = WHICH,
    protocol: Protocol = Protocol(),
    config=None,
    random: bool = True,
    device: str = "cpu",
    cache_dir: str | os.PathLike | None = None,
    on_progress=None,
) -> list[Row]:
    """Rows of the encoders in a checkpoint file or run folder, first the random-init control.

    ``train``, ``val``, ``test``: manifests of a probe (``val`` None: 20 % of train is held out); ``fewshot``: a
    manifest of classes for episodes. ``config`` serves files that hold none. ``on_progress(text)`` is called before
    each part. Raises UserError kinds: a missing or damaged checkpoint, another architecture, unreadable manifests,
    too few samples, label gaps, other classes than the task's.
    """
    from vjepa_fast import data

    protocol = protocol.settled()
    if not (train and test) and not fewshot:
        raise UserError("nothing to measure: give --train and --test manifests, or --fewshot")
    manifests = {
        k: data.load_manifest(v) for k, v in (("train", train), ("val", val), ("test", test), ("fewshot", fewshot)) if v
    }
    classes = check_manifests(manifests, get_task(protocol.task) if protocol.task else None) if train and test else None
    say = on_progress or (lambda text: None)
    encoders = encoders_of(path, which, config=config, random=random, say=say)
    sources = _sources(manifests, encoders[0][2], protocol, say)
    pooled = [p for p in protocol.probes if p != "attentive"]
    rows = []
    for label, kind, encoder in encoders:
        encoder.to(device)
        parts = {}
        for part, source in sources.items():
            if not pooled and part != "fewshot":
                continue
            say(f"{label}: features of {part} ({len(source.labels)} clips)")
            parts[part] = extract_features(
                encoder,
                source,
                pooling=protocol.pooling,
                level=protocol.level,
                batch_size=protocol.batch_size,
                device=device,
                cache_dir=cache_dir,
                num_frames=protocol.num_frames,
                crop_size=protocol.crop_size,
                frame_step=protocol.frame_step,
                images=protocol.images,
                workers=protocol.workers,
                spread=protocol.spread,
                short=protocol.short,
            )
        if train and test:
            more = {"label": label, "kind": kind, "suite": suite_name(manifests["test"])}
            rows += _probes(encoder, more, parts, sources, manifests, protocol, classes, device, cache_dir, say)
        if "fewshot" in parts:
            rows += episode_rows(
                label,
                kind,
                suite_name(manifests["fewshot"]) + " few-shot",
                parts["fewshot"],
                way=protocol.way,
                shots=protocol.shots,
                queries=protocol.queries,
                episodes=protocol.episodes,
                seed=protocol.seed,
            )
    return against(rows, [r for r in rows if r.kind == "random"])


def _probes(
    encoder, row: dict, parts: dict[str, Features], sources, manifests, protocol: Protocol, classes: int, device,
    cache_dir, say,
) -> list[Row]:  # fmt: skip
    """The rows of every probe of one encoder; ``row``: label, kind and suite."""
    rows = []
    if pooled := tuple(p for p in protocol.probes if p in ("linear", "knn")):
        say(f"{row['label']}: probes")
        rows += probe_rows(
            **row, train=parts["train"], val=parts.get("val"), test=parts["test"], probes=pooled, seed=protocol.seed
        )
    more = {"classes": classes, "epochs": protocol.epochs, "batch_size": protocol.probe_batch, "seed": protocol.seed}
    more.update(device=device, on_progress=lambda i, n: say(f"{row['label']}: probe, epoch {i} of {n}"))
    result = None
    if "published" in protocol.probes:
        settings = published_settings(get_task(protocol.task) if protocol.task else None)
        test = parts["test"]
        name, result = "published", published_probe(parts["train"], test, settings, **more)
    if "attentive" in protocol.probes:
        tokens = {}
        for part in [p for p in ("train", "val", "test") if p in sources]:
            views = (protocol.clips, protocol.crops)
            source = sources[part] if views == (1, 1) else manifests[part]
            say(f"{row['label']}: tokens of {part} ({len(source.labels)} clips)")
            tokens[part] = extract_tokens(
                encoder, source, clips=views[0], crops=views[1], level=protocol.level, storage=protocol.storage,
                batch_size=protocol.batch_size, device=device, cache_dir=cache_dir, num_frames=protocol.num_frames,
                crop_size=protocol.crop_size, frame_step=protocol.frame_step, short=protocol.short,
                images=protocol.images, workers=protocol.workers,
            )  # fmt: skip
        test = tokens["test"]
        name, result = "attentive", attentive_probe(tokens["train"], tokens.get("val"), test, **more)
    if result:
        chance = float(np.unique(test.y, return_counts=True)[1].max() / len(test.y))
        rows.append(row_of(result, **row, probe=name, chance=chance))
    return rows


def suite_name(manifest) -> str:
    """The folder's name for ``motion8/test.csv``, the file's own name otherwise."""
    stem, folder = Path(manifest.path).stem, Path(manifest.path).resolve().parent.name
    return folder if stem in ("train", "val", "test", "base", "novel") and folder else stem


def _sources(manifests: dict, encoder, protocol: Protocol, say) -> dict:
    """Small manifests decoded once into memory; large ones stay on disk and are decoded per encoder."""
    view = _view(
        encoder, protocol.num_frames, protocol.crop_size, protocol.frame_step, spread=protocol.spread,
        short=protocol.short,
    )  # fmt: skip
    frames, crop = view.pop("num_frames"), view.pop("crop_size")
    total = sum(len(m.labels) for m in manifests.values()) * 3 * frames * crop * crop
    if total > IN_MEMORY:
        return manifests
    sources = {}
    for part, manifest in manifests.items():
        say(f"decoding {part} ({len(manifest.labels)} clips)")
        sources[part] = decode_clips(manifest, num_frames=frames, crop_size=crop, **view)
        if len(sources[part]) < len(manifest.labels):
            say(f"{manifest.path}: {len(manifest.labels) - len(sources[part])} unreadable samples left out")
    for part in ("train", "test"):
        if part in sources and len(set(sources[part].labels.tolist())) < 2:
            raise DataError(f"{manifests[part].path}: a probe needs at least two classes")
    return sources
