"""Features and tokens on disk: what a cache is bound to, where it lies, and when it is refused."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import torch

from vjepa_fast.errors import CheckpointError
from vjepa_fast.evaluation.extract.clips import ClipSet, Source, clip_settings
from vjepa_fast.imagenet import IMAGENET_MEAN, IMAGENET_STD
from vjepa_fast.models.interop import encoder_hash
from vjepa_fast.models.vit import VisionTransformer

HINT = "choose another cache folder, or keep no features"


def file_hash(path: str | os.PathLike) -> str:
    """sha256 (hex) of a file's content."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(2**20):
            digest.update(block)
    return digest.hexdigest()


def normalisation(encoder: VisionTransformer | None) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """(mean, standard deviation) per colour of what the encoder sees: as it was trained, else ImageNet's."""
    known = clip_settings(encoder) if encoder is not None else {}
    return tuple(known.get("mean") or IMAGENET_MEAN), tuple(known.get("std") or IMAGENET_STD)


def cache_key(encoder: VisionTransformer, source: Source, view: dict, dtype: torch.dtype, **settings: Any) -> dict:
    """All that the numbers depend on: encoder, data (files with size and time, or the clips' content) and settings."""
    return {
        **settings,
        "encoder": encoder_hash(encoder),
        "data": str(source.hash),
        "view": {} if isinstance(source, ClipSet) else view,
        "dtype": str(dtype),
        "mean_std": [list(v) for v in normalisation(encoder)],
    }


def cache_stem(cache_dir: str | os.PathLike, name: str, key: dict) -> Path:
    """``<cache_dir>/<name>-<24 hex digits of the key>``."""
    digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:24]
    return Path(cache_dir) / f"{''.join(c if c.isalnum() or c in '-_' else '_' for c in name)}-{digest}"


def refuse_other(path: Path, held: dict, wanted: dict) -> None:
    """CheckpointError where the key ``held`` at ``path`` is another than what of it is ``wanted``."""
    differs = [k for k in wanted if held.get(k) != wanted[k]]
    if differs:
        what = "another checkpoint" if "encoder" in differs else f"other settings ({', '.join(differs)})"
        raise CheckpointError(f"{path}: this feature cache belongs to {what}; delete it or use another cache folder")
