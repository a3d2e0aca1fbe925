"""Frozen features of a manifest or of clips in memory, pooled over the token grid, cached on disk.

Shapes: n samples, B batch, F frames, grid (T, H, W), N = T*H*W tokens, L levels, E embed_dim, D = E (last) or L*E
(all).
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from vjepa_fast import ops
from vjepa_fast.errors import CheckpointError, DataError, UserError
from vjepa_fast.imagenet import IMAGENET_MEAN, IMAGENET_STD
from vjepa_fast.models.interop import encoder_hash

LEVELS = ("last", "all")
FORMAT = 1  # raise it when the numbers that this file computes change: old caches are then recomputed


@dataclass(frozen=True)
class Features:
    """Features ``x`` float32 ``[n, d]`` and labels ``y`` int64 ``[n]`` of the data set ``name``."""

    x: np.ndarray
    y: np.ndarray
    name: str = "features"

    def __post_init__(self):
        x, y = np.asarray(self.x, dtype=np.float32), np.asarray(self.y, dtype=np.int64).reshape(-1)
        if x.ndim != 2 or len(x) != len(y):
            raise DataError(f"{self.name}: features must be [n, d] with n labels, got {x.shape} and {y.shape}")
        object.__setattr__(self, "x", x)
        object.__setattr__(self, "y", y)

    def take(self, index) -> Features:
        """The samples of an index or bool mask ``[n]``."""
        return Features(self.x[index], self.y[index], self.name)


@dataclass(frozen=True)
class ClipSet:
    """Decoded clips in memory: ``clips`` uint8 ``[n, 3, F, H, W]``, ``labels`` int64 ``[n]``; ``hash`` names the
    content.
    """

    clips: Tensor
    labels: np.ndarray
    hash: str
    name: str = "clips"
    images: bool = False  # still images repeated over the frames

    def __len__(self) -> int:
        return len(self.labels)


# ---------------------------------------------------------------- pooling


def _mean(z_BTHWD: Tensor) -> Tensor:
    return z_BTHWD.mean((1, 2, 3))


def _time(z_BTHWD: Tensor) -> Tensor:
    return z_BTHWD.mean((2, 3)).flatten(1)


def _meanstd(z_BTHWD: Tensor) -> Tensor:
    tokens = z_BTHWD.flatten(1, 3)
    return torch.cat([tokens.mean(1), tokens.std(1, correction=0)], dim=1)


POOLINGS: dict[str, Callable[[Tensor], Tensor]] = {"mean": _mean, "time": _time, "meanstd": _meanstd}


def pool_tokens(z: Tensor, grid: tuple[int, int, int], pooling: str) -> Tensor:
    """Pool tokens ``[B, N, D]`` of a grid ``(T, H, W)``.

    "mean": over all tokens, ``[B, D]``; "time": over space only, the time steps side by side, ``[B, T*D]`` (a mean over
    time hides motion); "meanstd": mean and standard deviation over all tokens, ``[B, 2*D]``.
    """
    if pooling not in POOLINGS:
        raise UserError(f"unknown pooling {pooling!r}; choose from {', '.join(POOLINGS)}")
    return POOLINGS[pooling](z.unflatten(1, tuple(grid)))


# ---------------------------------------------------------------- encoders


def clip_settings(encoder: nn.Module) -> dict:
    """``encoder.clip_settings`` (crop_size, num_frames, frame_step or fps or duration, mean, std); may be empty."""
    return dict(getattr(encoder, "clip_settings", None) or {})


def encode(encoder: nn.Module, clips: Tensor, *, level: str = "last", mean=None, std=None) -> tuple[Tensor, tuple]:
    """Tokens ``[B, N, D]`` and grid ``(T, H, W)`` of uint8 clips ``[B, 3, F, H, W]`` on the encoder's device."""
    if level not in LEVELS:
        raise UserError(f"unknown level {level!r}; choose from {', '.join(LEVELS)}")
    settings = clip_settings(encoder)
    clip = ops.normalize_clip(
        clips, mean or settings.get("mean", IMAGENET_MEAN), std or settings.get("std", IMAGENET_STD)
    )
    z = encoder(clip, hierarchical=level == "all")
    return z, tuple(encoder.grid(clip.shape))


# ---------------------------------------------------------------- extraction


def data_hash(source) -> str:
    """What a feature cache is bound to: the hash of a manifest (its lines and each file's size and time) or of the
    clips.
    """
    return str(source.hash)


def _still(source) -> bool:
    return source.images if isinstance(source, ClipSet) else source.kind == "image"


def _view(encoder, num_frames, crop_size, frame_step, **more) -> dict:
    """The clip that the encoder was trained on, where the caller does not say otherwise; ``more``: spread, short."""
    known = clip_settings(encoder)
    view = {
        "num_frames": num_frames or known.get("num_frames") or 16,
        "crop_size": crop_size or known.get("crop_size") or 224,
    }
    if frame_step:
        view["frame_step"] = frame_step
    else:
        view.update({k: known[k] for k in ("frame_step", "fps", "duration") if known.get(k)})
    view.update({k: v for k, v in more.items() if v})
    return view


def decode_clips(manifest, *, num_frames: int, crop_size: int, batch_size: int = 32, **view) -> ClipSet:
    """Decode a whole manifest's centre views into memory once (small data sets); arguments as
    :func:`extract_features`.
    """
    from vjepa_fast import data

    clips, labels = [], []
    for clip, label, _ in data.eval_batches(manifest, num_frames, crop_size, batch_size, **view):
        clips.append(clip)
        labels.append(torch.as_tensor(label))
    if not clips:
        raise DataError(f"{manifest.path}: no readable sample")
    clips = torch.cat(clips)
    digest = hashlib.sha256(
        f"{data_hash(manifest)} {num_frames} {crop_size} {sorted(view.items())}".encode()
    ).hexdigest()
    return ClipSet(clips, torch.cat(labels).numpy().astype(np.int64), digest, manifest.name, manifest.kind == "image")


def _batches(source, batch_size: int, view: dict, workers: int) -> Iterator[tuple[Tensor, Tensor]]:
    if isinstance(source, ClipSet):
        for start in range(0, len(source), batch_size):
            rows = slice(start, start + batch_size)
            yield source.clips[rows], torch.as_tensor(source.labels[rows])
        return
    from vjepa_fast import data

    view = dict(view)
    frames, crop = view.pop("num_frames"), view.pop("crop_size")
    for clip, label, _ in data.eval_batches(source, frames, crop, batch_size, workers=workers, **view):
        yield clip, torch.as_tensor(label)


@torch.no_grad()
def extract_features(
    encoder: nn.Module,
    manifest,
    *,
    pooling: str = "time",
    level: str = "last",
    batch_size: int = 16,
    device: str | torch.device | None = None,
    cache_dir: str | os.PathLike | None = None,
    num_frames: int | None = None,
    crop_size: int | None = None,
    frame_step: int | None = None,
    images: str = "repeat",
    dtype: torch.dtype | None = None,
    workers: int = 0,
    spread: str | None = None,
    short: str | None = None,
) -> Features:
    """Pooled frozen features of every readable sample of ``manifest`` (a data.Manifest or a :class:`ClipSet`).

    ``pooling`` as :func:`pool_tokens`; ``level="all"`` concatenates all levels of the encoder. The view is the centre
    clip with the frames, size and step of ``encoder.clip_settings`` unless given here. ``images="single"`` passes
    still images as one frame through the image patch embedding, "repeat" as a clip that stands still. ``dtype``:
    autocast (bfloat16 on CUDA by default, float32 elsewhere). ``spread`` and ``short`` as ``data.Sampling``. With
    ``cache_dir`` the result is kept as safetensors + json under a key of encoder weights, data and settings; a file
    that holds another key is refused with CheckpointError.
    """
    if images not in ("repeat", "single"):
        raise UserError(f"images must be repeat or single, got {images!r}")
    if pooling not in POOLINGS:
        raise UserError(f"unknown pooling {pooling!r}; choose from {', '.join(POOLINGS)}")
    device = torch.device(device or next(encoder.parameters()).device)
    dtype = dtype or (torch.bfloat16 if device.type == "cuda" else torch.float32)
    view = _view(encoder, num_frames, crop_size, frame_step, spread=spread, short=short)
    key, path = None, None
    if cache_dir is not None:
        key = {
            "format": FORMAT,
            "encoder": encoder_hash(encoder),
            "data": data_hash(manifest),
            "pooling": pooling,
            "level": level,
            "view": {} if isinstance(manifest, ClipSet) else view,
            "images": images,
            "dtype": str(dtype),
            "mean_std": [
                list(clip_settings(encoder).get(k) or d) for k, d in (("mean", IMAGENET_MEAN), ("std", IMAGENET_STD))
            ],
        }
        path = cache_path(cache_dir, manifest.name, key)
        if (cached := load_cache(path, key, manifest.name)) is not None:
            return cached
    was_training = encoder.training
    encoder.to(device).eval()
    rows, labels = [], []
    with torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32):
        for clip, label in _batches(manifest, batch_size, view, workers):
            if images == "single" and _still(manifest):
                clip = clip[:, :, :1]
            z, grid = encode(encoder, clip.to(device, non_blocking=True), level=level)
            rows.append(pool_tokens(z.float(), grid, pooling).cpu())
            labels.append(label)
    encoder.train(was_training)
    if not rows:
        raise DataError(f"{manifest.name}: no readable sample to take features of")
    features = Features(torch.cat(rows).numpy(), torch.cat(labels).numpy(), manifest.name)
    if path is not None:
        save_cache(path, key, features)
    return features


# ---------------------------------------------------------------- cache


def cache_path(cache_dir, name: str, key: dict) -> Path:
    """Where the features of ``key`` lie: ``<cache_dir>/<name>-<24 hex digits of the key>.safetensors``."""
    digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:24]
    return Path(cache_dir) / f"{''.join(c if c.isalnum() or c in '-_' else '_' for c in name)}-{digest}.safetensors"


def load_cache(path: Path, key: dict, name: str) -> Features | None:
    """Features at ``path``; None where there are none or the pair is incomplete or damaged; CheckpointError on
    another key.
    """
    meta = path.with_suffix(".json")
    if not (path.is_file() and meta.is_file()):
        return None
    try:
        stored = json.loads(meta.read_text())
        held = stored["key"]
    except (ValueError, KeyError, TypeError):
        return None
    if held != key:
        differs = [k for k in key if held.get(k) != key[k]] or ["key"]
        what = "another checkpoint" if "encoder" in differs else f"other settings ({', '.join(differs)})"
        raise CheckpointError(f"{path}: this feature cache belongs to {what}; delete it or use another cache folder")
    blob = path.read_bytes()
    if hashlib.sha256(blob).hexdigest() != stored.get("sha256"):
        return None
    from safetensors.numpy import load

    arrays = load(blob)
    return Features(arrays["x"], arrays["y"], name)


def save_cache(path: Path, key: dict, features: Features) -> None:
    """Write both files under temporary names and rename them, the json last; UserError where the folder cannot be
    written.
    """
    from safetensors.numpy import save

    blob = save({"x": np.ascontiguousarray(features.x), "y": np.ascontiguousarray(features.y)})
    meta = {"key": key, "sha256": hashlib.sha256(blob).hexdigest(), "n": len(features.y), "d": features.x.shape[1]}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _replace(path, blob)
        _replace(path.with_suffix(".json"), json.dumps(meta, indent=1).encode())
    except OSError as error:
        raise UserError(
            f"{path.parent}: the feature cache cannot be written ({error.strerror}); choose another folder"
        ) from None


def _replace(path: Path, blob: bytes) -> None:
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=path.name, suffix=".tmp")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(blob)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
