"""The whole frozen evaluation of one checkpoint: its encoders beside the same architecture with random weights."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from vjepa_fast.errors import CheckpointError, DataError, UserError
from vjepa_fast.evaluation.baselines import random_encoder
from vjepa_fast.evaluation.compare import Row, against, episode_rows, probe_rows
from vjepa_fast.evaluation.features import _view, decode_clips, extract_features

WHICH = ("target_encoder", "encoder")
IN_MEMORY = 512 * 2**20  # bytes of decoded clips below which a manifest is decoded once for all encoders


@dataclass(frozen=True)
class Protocol:
    """How features are taken and read; one protocol serves every encoder of a comparison."""

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
    too few samples.
    """
    from vjepa_fast import data

    if not (train and test) and not fewshot:
        raise UserError("nothing to measure: give --train and --test manifests, or --fewshot")
    manifests = {
        k: data.load_manifest(v) for k, v in (("train", train), ("val", val), ("test", test), ("fewshot", fewshot)) if v
    }
    say = on_progress or (lambda text: None)
    encoders = encoders_of(path, which, config=config, random=random, say=say)
    sources = _sources(manifests, encoders[0][2], protocol, say)
    rows = []
    for label, kind, encoder in encoders:
        encoder.to(device)
        parts = {}
        for part, source in sources.items():
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
            )
        if "train" in parts and "test" in parts:
            say(f"{label}: probes")
            rows += probe_rows(
                label,
                kind,
                suite_name(manifests["test"]),
                parts["train"],
                parts.get("val"),
                parts["test"],
                probes=protocol.probes,
                seed=protocol.seed,
            )
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


def suite_name(manifest) -> str:
    """The folder's name for ``motion8/test.csv``, the file's own name otherwise."""
    stem, folder = Path(manifest.path).stem, Path(manifest.path).resolve().parent.name
    return folder if stem in ("train", "val", "test", "base", "novel") and folder else stem


def _sources(manifests: dict, encoder, protocol: Protocol, say) -> dict:
    """Small manifests decoded once into memory; large ones stay on disk and are decoded per encoder."""
    view = _view(encoder, protocol.num_frames, protocol.crop_size, protocol.frame_step)
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
