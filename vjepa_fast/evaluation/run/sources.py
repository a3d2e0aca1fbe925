"""How features are taken for a whole comparison: the same view, pooling and level for every encoder."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path

import torch

from vjepa_fast.data.manifests.manifest import Manifest
from vjepa_fast.evaluation.extract.clips import ClipSet, Source, clip_view, decode_clips, fits_in_memory
from vjepa_fast.evaluation.extract.features import Features, extract_features
from vjepa_fast.evaluation.run.encoders import Subject
from vjepa_fast.models.vit import VisionTransformer


@dataclass(frozen=True)
class FeatureSettings:
    """Arguments of `extract_features` that one comparison has in common; None: as the encoder was trained."""

    pooling: str = "time"
    level: str = "last"
    batch_size: int = 16
    num_frames: int | None = None
    crop_size: int | None = None
    frame_step: int | None = None
    images: str = "repeat"
    workers: int = 0
    spread: str | None = None
    short: str | None = None  # "hold" repeats the last frame of short videos (set by a task), "refuse" leaves them out
    geometry: str | None = None  # what of a frame is shown, as ``data.eval_views``; None: the centre view
    precision: str | None = None  # "float32": no autocast; None: bfloat16 on CUDA

    def extraction(self) -> dict:
        """The arguments that `extract_features` and `extract_tokens` share."""
        own = {f.name: getattr(self, f.name) for f in fields(FeatureSettings) if f.name not in ("pooling", "precision")}
        return own if self.precision is None else {**own, "dtype": getattr(torch, self.precision)}

    def take(self, encoder: VisionTransformer, source: Source, subject: Subject) -> Features:
        """The pooled features of ``source``, on the device and in the cache folder of ``subject``."""
        own = {"pooling": self.pooling, **self.extraction()}
        return extract_features(encoder, source, device=subject.device, cache_dir=subject.cache_dir, **own)


AS_TRAINED = FeatureSettings()


def open_sources(
    manifests: Mapping[str, Manifest], encoder: VisionTransformer, settings: FeatureSettings, subject: Subject
) -> dict[str, Manifest] | dict[str, ClipSet]:
    """Small manifests decoded once into memory; large ones stay on disk and are decoded per encoder."""
    s = settings
    more = {"spread": s.spread, "short": s.short, "geometry": s.geometry}
    view = clip_view(encoder, s.num_frames, s.crop_size, s.frame_step, **more)
    if not fits_in_memory(sum(map(len, manifests.values())), view):
        return dict(manifests)
    sources = {}
    for part, manifest in manifests.items():
        subject.say(f"decoding {part} ({len(manifest)} clips)")
        sources[part] = decode_clips(manifest, **view)
        if len(sources[part]) < len(manifest):
            subject.say(f"{manifest.path}: {len(manifest) - len(sources[part])} unreadable samples left out")
    return sources


def suite_name(manifest: Manifest) -> str:
    """The folder's name for ``motion8/test.csv``, the file's own name otherwise."""
    stem, folder = Path(manifest.path).stem, Path(manifest.path).resolve().parent.name
    return folder if stem in ("train", "val", "test", "base", "novel") and folder else stem
