"""Frozen features of a manifest or of clips in memory, pooled over the token grid, cached on disk.

    CACHE/<name>-<24 hex digits of the key>.safetensors     x [n, d], y [n]
    CACHE/<name>-<...>.json                                 the key, and the sha256 of the other file

Shapes: n samples, B batch, F frames, grid (T, H, W), N = T*H*W tokens, L levels, E embed_dim, D = E (last) or L*E
(all).
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias, TypedDict

import numpy as np
import torch
from torch import Tensor

from vjepa_fast import files, ops
from vjepa_fast.errors import ConfigError, DataError
from vjepa_fast.evaluation.choices import check_choice
from vjepa_fast.evaluation.extract.cache import HINT, cache_key, cache_stem, normalisation, refuse_other
from vjepa_fast.evaluation.extract.clips import Source, clip_batches, clip_view, is_still
from vjepa_fast.files import parse_json
from vjepa_fast.models.vit import VisionTransformer

if TYPE_CHECKING:
    from typing_extensions import Unpack

LEVELS = ("last", "all")
IMAGES = ("repeat", "single")
CLS = "cls"  # the class token of the last level in place of a pooling, of encoders that have one
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

    def __len__(self) -> int:
        return len(self.y)

    @property
    def dim(self) -> int:
        """The width d."""
        return self.x.shape[1]

    def take(self, index: np.ndarray) -> Features:
        """The samples of an index or bool mask ``[n]``."""
        return Features(self.x[index], self.y[index], self.name)

    def same_samples(self, other: Features) -> bool:
        """Whether both hold the same features."""
        return np.array_equal(self.x, other.x)

    def check_finite(self) -> None:
        """DataError where a feature is NaN or infinite; the message counts them."""
        bad = int((~np.isfinite(self.x).all(axis=1)).sum())
        if bad:
            raise DataError(
                f"{self.name}: features of {bad} of {len(self)} samples are not finite; the encoder gives "
                "NaN or infinity"
            )


# ---------------------------------------------------------------- pooling


def _last_less_first(z: Tensor) -> Tensor:
    by_time = z.mean((2, 3))
    return by_time[:, -1] - by_time[:, 0]


def _differences(z: Tensor) -> Tensor:
    """[mean; std; mean |z_t - z_(t-1)|; last less first time step's mean], 4D; with one time step the last two are
    0.
    """
    moved = z.diff(dim=1).abs().mean((1, 2, 3)) if z.shape[1] > 1 else torch.zeros_like(z[:, 0, 0, 0])
    return torch.cat([POOLINGS["meanstd"](z), moved, _last_less_first(z)], dim=1)


def _salient(z: Tensor) -> Tensor:
    """[mean weighted by motion less mean; RMS deviation from the mean over time; last less first], 3D; a token's
    motion is its squared deviation from the mean over time, and where nothing moves all is 0.
    """
    squares = (z - z.mean(1, keepdim=True)).square()
    motion = squares.mean(4, keepdim=True)
    total = motion.sum((1, 2, 3))
    weighted = (motion * z).sum((1, 2, 3)) / total.clamp_min(1e-30)
    focus = torch.where(total > 0, weighted - z.mean((1, 2, 3)), 0.0)
    return torch.cat([focus, squares.mean((1, 2, 3)).sqrt(), _last_less_first(z)], dim=1)


POOLINGS: dict[str, Callable[[Tensor], Tensor]] = {  # of z [B, T, H, W, D]
    "mean": lambda z: z.mean((1, 2, 3)),
    "time": lambda z: z.mean((2, 3)).flatten(1),
    "meanstd": lambda z: torch.cat([z.flatten(1, 3).mean(1), z.flatten(1, 3).std(1, correction=0)], dim=1),
    "tdiff": _differences,
    "sal": _salient,
}


def pool_tokens(z: Tensor, grid: tuple[int, int, int], pooling: str) -> Tensor:
    """Pool tokens ``[B, N, D]`` of a grid ``(T, H, W)``.

    "mean": over all tokens, ``[B, D]``; "time": over space only, the time steps side by side, ``[B, T*D]`` (a mean over
    time hides motion); "meanstd": mean and standard deviation over all tokens, ``[B, 2*D]``. "tdiff", ``[B, 4*D]``:
    these two, the mean of ``|z_t - z_(t-1)|``, and the last time step's mean less the first's. "sal", ``[B, 3*D]``: the
    mean weighted by each token's motion less the plain mean, the RMS deviation from the mean over time, and the last
    time step's mean less the first's. With one time step all differences are 0.
    """
    check_choice("pooling", pooling, POOLINGS)
    return POOLINGS[pooling](z.unflatten(1, tuple(grid)))


def poolings_of(encoder: VisionTransformer) -> list[tuple[str, str]]:
    """The (level, pooling) pairs that an encoder has, simplest first."""
    levels = LEVELS if encoder.levels > 1 else LEVELS[:1]
    found = [(level, pooling) for level in levels for pooling in POOLINGS]
    return found if getattr(encoder, "cls_token", None) is None else [*found, ("last", CLS)]


def check_wanted(encoder: VisionTransformer, wanted: Sequence[tuple[str, str]]) -> None:
    """ConfigError for a (level, pooling) pair that there is not, or that this encoder has not."""
    for level, pooling in wanted:
        check_choice("pooling", pooling, (*POOLINGS, CLS))
        check_choice("level", level, LEVELS)
        if pooling != CLS:
            continue
        if getattr(encoder, "cls_token", None) is None:
            raise ConfigError(f"pooling cls: this encoder has no class token; choose from {', '.join(POOLINGS)}")
        if level != "last":
            raise ConfigError(f"pooling cls: there is one class token, of level last; got level {level}")


# ---------------------------------------------------------------- encoding


Visit: TypeAlias = Callable[[Tensor, tuple[int, int, int], Tensor], None]


class Taking(TypedDict, total=False):
    """How clips are read and encoded.

    ``images="single"`` passes still images as one frame through the image patch embedding, "repeat" as a clip that
    stands still. ``dtype``: autocast (bfloat16 on CUDA by default, float32 elsewhere). ``spread`` and ``short`` as
    ``data.Sampling``, ``geometry`` as ``data.eval_views``. With ``cache_dir`` the result is kept there, under a key of
    encoder weights, data and settings.
    """

    batch_size: int
    device: str | torch.device | None
    cache_dir: str | os.PathLike | None
    num_frames: int | None
    crop_size: int | None
    frame_step: int | None
    images: str
    dtype: torch.dtype | None
    workers: int
    spread: str | None
    short: str | None
    geometry: str | None


def encode(
    encoder: VisionTransformer,
    clips: Tensor,
    *,
    level: str = "last",
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
) -> tuple[Tensor, tuple[int, int, int]]:
    """Tokens ``[B, N, D]`` and grid ``(T, H, W)`` of uint8 clips ``[B, 3, F, H, W]`` on the encoder's device."""
    check_choice("level", level, LEVELS)
    clip = _normalised(encoder, clips, mean, std)
    z = encoder(clip, hierarchical=level == "all")
    return z, encoder.grid(clip.shape)


def _normalised(
    encoder: VisionTransformer, clips: Tensor, mean: Sequence[float] | None = None, std: Sequence[float] | None = None
) -> Tensor:
    known_mean, known_std = normalisation(encoder)
    return ops.normalize_clip(clips, mean or known_mean, std or known_std)


def encode_views(
    encoder: VisionTransformer,
    views: Tensor,
    each: Callable[[Tensor, tuple[int, int, int]], Tensor],
    *,
    device: torch.device,
    batch_size: int,
    level: str = "last",
    summary: bool = False,
) -> tuple[Tensor, tuple[int, int, int]]:
    """``each(tokens, grid)`` of uint8 views ``[B, V, 3, F, H, W]`` on the CPU, ``[B, V, ...]``, and the grid; at most
    ``batch_size`` views at once. ``summary``: of the class token ``[B, E]`` in place of the tokens.
    """
    out, grid = [], (0, 0, 0)
    for part in views.flatten(0, 1).split(batch_size):
        part = part.to(device, non_blocking=True)
        if summary:
            z, grid = encoder.summary(_normalised(encoder, part), None), encoder.grid(part.shape)
        else:
            z, grid = encode(encoder, part, level=level)
        out.append(each(z, grid).cpu())
    return torch.cat(out).unflatten(0, views.shape[:2]), grid


@contextmanager
def frozen(encoder: VisionTransformer, device: torch.device, dtype: torch.dtype) -> Iterator[None]:
    """``encoder`` on ``device``, in eval mode and under autocast to ``dtype`` (float32: none); its mode is restored."""
    was_training = encoder.training
    encoder.to(device).eval()
    try:
        with torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32):
            yield
    finally:
        encoder.train(was_training)


def amp(device: torch.device) -> torch.autocast:
    """bfloat16 autocast on CUDA, nothing elsewhere."""
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=device.type == "cuda")


def place_of(
    encoder: VisionTransformer, device: str | torch.device | None, dtype: torch.dtype | None
) -> tuple[torch.device, torch.dtype]:
    """(device, autocast type): where the encoder is, bfloat16 on CUDA and float32 elsewhere, unless given."""
    device = torch.device(device or next(encoder.parameters()).device)
    return device, dtype or (torch.bfloat16 if device.type == "cuda" else torch.float32)


def extract_features(
    encoder: VisionTransformer, manifest: Source, *, pooling: str = "time", level: str = "last", **how: Unpack[Taking]
) -> Features:
    """Pooled frozen features of every readable sample of ``manifest`` (a data.Manifest or a :class:`ClipSet`).

    The view is the centre clip with the frames, size and step of ``encoder.clip_settings`` unless given here.

    ``pooling`` as `pool_tokens`, or "cls", the class token of the last level; ``level="all"`` takes all levels of the
    encoder side by side. ``how``: `Taking`.

    Raises:
        CheckpointError: the cache file of this key holds another one.
        DataError: no readable sample.
        UserError: unknown pooling, level or images, "cls" of an encoder without class token, or a cache folder that
            cannot be written.
    """
    return extract_poolings(encoder, manifest, ((level, pooling),), **how)[level, pooling]


@torch.no_grad()
def extract_poolings(
    encoder: VisionTransformer,
    manifest: Source,
    wanted: Sequence[tuple[str, str]],
    *,
    visit: Visit | None = None,
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
    geometry: str | None = None,
) -> dict[tuple[str, str], Features]:
    """The features of each (level, pooling) of ``wanted``, all from one pass of the clips through the encoder.

    ``visit(z, grid, labels)`` gets the last level of every batch too, float32 ``[B, N, E]``, on the encoder's device;
    with it there is a pass even where all that is wanted is cached. The rest, and what is raised, as
    `extract_features`.
    """
    check_choice("images", images, IMAGES)
    check_wanted(encoder, wanted)
    device, dtype = place_of(encoder, device, dtype)
    view = clip_view(encoder, num_frames, crop_size, frame_step, spread=spread, short=short, geometry=geometry)
    keys, paths, found = {}, {}, {}
    if cache_dir is not None:
        common = cache_key(encoder, manifest, view, dtype, format=FORMAT, pooling="", level="", images=images)
        for level, pooling in wanted:
            key = {**common, "pooling": pooling, "level": level}
            path = Path(f"{cache_stem(cache_dir, manifest.name, key)}.safetensors")
            keys[level, pooling], paths[level, pooling] = key, path
            if (cached := load_cache(path, key, manifest.name)) is not None:
                found[level, pooling] = cached
    missing = [which for which in wanted if which not in found]
    if not missing and visit is None:
        return {which: found[which] for which in wanted}
    depth = "all" if any(level == "all" for level, _ in missing) else "last"
    only_all = visit is None and all(level == "all" for level, _ in missing)
    rows, labels = {which: [] for which in missing}, []
    with frozen(encoder, device, dtype):
        for clip, label in clip_batches(manifest, batch_size, view, workers):
            if images == "single" and is_still(manifest):
                clip = clip[:, :, :1]
            clip, summary = clip.to(device, non_blocking=True), None
            if ("last", CLS) in missing:
                clip = _normalised(encoder, clip)
                z, summary = encoder.with_summary(clip, hierarchical=depth == "all")
                grid = encoder.grid(clip.shape)
            else:
                z, grid = encode(encoder, clip, level=depth)
            z = z.float()
            last = z if depth == "last" or only_all else z[..., -encoder.embed_dim :]
            for level, pooling in missing:
                if pooling == CLS:
                    assert summary is not None
                    rows[level, pooling].append(summary.float().cpu())
                else:
                    rows[level, pooling].append(pool_tokens(z if level == "all" else last, grid, pooling).cpu())
            if visit is not None:
                visit(last, grid, label)
            labels.append(label)
    if not labels:
        raise DataError(f"{manifest.name}: no readable sample to take features of")
    y = torch.cat(labels).numpy()
    for which in missing:
        found[which] = Features(torch.cat(rows.pop(which)).numpy(), y, manifest.name)
        if which in paths:
            save_cache(paths[which], keys[which], found[which])
    return {which: found[which] for which in wanted}


# ---------------------------------------------------------------- cache


def load_cache(path: Path, key: dict, name: str) -> Features | None:
    """Features at ``path``; None where there are none or the pair is incomplete or damaged; CheckpointError on
    another key.
    """
    meta = path.with_suffix(".json")
    if not (path.is_file() and meta.is_file()):
        return None
    try:
        stored = parse_json(meta.read_bytes())
        held = stored["key"]
    except (ValueError, KeyError, TypeError):
        return None
    if not isinstance(held, dict):
        return None
    refuse_other(path, held, {**dict.fromkeys(held), **key})
    blob = path.read_bytes()
    if hashlib.sha256(blob).hexdigest() != stored.get("sha256"):
        return None
    from safetensors.numpy import load

    arrays = load(blob)
    return Features(arrays["x"], arrays["y"], name)


def save_cache(path: Path, key: dict, features: Features) -> None:
    """Write both files, the json last; UserError where the folder cannot be written."""
    from safetensors.numpy import save

    blob = save({"x": np.ascontiguousarray(features.x), "y": np.ascontiguousarray(features.y)})
    meta = {"key": key, "sha256": hashlib.sha256(blob).hexdigest(), "n": len(features), "d": features.dim}
    files.write_bytes(path, blob, HINT)
    files.write_text(path.with_suffix(".json"), json.dumps(meta, indent=1), HINT)
