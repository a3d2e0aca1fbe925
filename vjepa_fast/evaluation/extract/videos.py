"""Features of videos for other programs: one tensor, and the names of the videos in its order.

It reads, encodes and pools as `extract_features` does, with several clips and single levels besides.

Legend: n videos, V views (clips * crops), grid (T, H, W), L levels, E embed_dim, D width of the levels taken.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from vjepa_fast import __version__, files
from vjepa_fast.data.bad_samples import BadSamples
from vjepa_fast.data.gather import gather
from vjepa_fast.data.manifests.root import Root
from vjepa_fast.data.views.evaluation import eval_views
from vjepa_fast.errors import ConfigError, DataError, UserError
from vjepa_fast.evaluation.choices import check_choice
from vjepa_fast.evaluation.extract.cache import normalisation
from vjepa_fast.evaluation.extract.clips import clip_view
from vjepa_fast.evaluation.extract.features import (
    CLS,
    IMAGES,
    POOLINGS,
    check_wanted,
    encode_views,
    frozen,
    place_of,
    pool_tokens,
)
from vjepa_fast.evaluation.extract.shards import check_memory
from vjepa_fast.evaluation.extract.tokens import STORAGE, stored_as
from vjepa_fast.models.interop import hash_weights

if TYPE_CHECKING:
    from vjepa_fast.models.vit import VisionTransformer

WAYS = (*POOLINGS, CLS, "none")
CLIPS = ("mean", "keep")
FORMAT = "vjepa_fast.features/1"
_HINT = "free space or choose another place with --out"


@dataclass(frozen=True, eq=False)
class VideoFeatures:
    """Features of videos, as `video_features` takes them.

    Attributes:
        x: float32 (or as stored) ``[n, ...]``, one row per video that could be read, in the order given.
        videos: the path of each row.
        labels: int64 ``[n]``, None unless all videos came from manifests.
        skipped: (path, reason) of each video that could not be read.
        encoder: ``sha256`` of the weights, and what the caller adds (path, which).
        settings: how they were taken: pooling, level, blocks, clips, grid, num_frames, crop_size, mean, std, ...
    """

    x: Tensor
    videos: list[str]
    labels: Tensor | None = None
    skipped: list[tuple[str, str]] = field(default_factory=list)
    encoder: dict[str, Any] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.videos)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a safetensors file: ``features``, with labels ``labels``, and the rest as its metadata (JSON texts).

        ``safetensors.torch.load_file`` reads the tensors, ``safe_open(path, "pt").metadata()`` the metadata,
        `load` both. UserError where it cannot be written.
        """
        from safetensors.torch import save

        tensors = {"features": self.x.contiguous()}
        if self.labels is not None:
            tensors["labels"] = self.labels
        texts = {
            "videos": self.videos,
            "skipped": self.skipped,
            "encoder": self.encoder,
            "settings": self.settings,
            "versions": {"vjepa_fast": __version__, "torch": str(torch.__version__)},
        }
        metadata = {"format": FORMAT, **{key: json.dumps(value) for key, value in texts.items()}}
        files.write_bytes(os.fspath(path), save(tensors, metadata), _HINT)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> VideoFeatures:
        """Read what `save` wrote. DataError for another file."""
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(path, "pt") as file:
                held = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (it is no mapping)
        except (OSError, SafetensorError) as error:
            raise DataError(f"{path}: cannot be read as safetensors ({files.first_line(error)})") from None
        if held.get("format") != FORMAT or "features" not in tensors:
            raise DataError(f"{path}: holds no features of videos; `vjepa-fast features` writes such files")
        skipped = [(video, reason) for video, reason in json.loads(held["skipped"])]
        more = (json.loads(held[key]) for key in ("encoder", "settings"))
        return cls(tensors["features"], json.loads(held["videos"]), tensors.get("labels"), skipped, *more)


@torch.no_grad()
def video_features(
    encoder: VisionTransformer,
    videos: str | os.PathLike[str] | Iterable[str | os.PathLike[str]],
    *,
    pooling: str = "mean",
    level: str | int | Sequence[int] = "last",
    clips: int = 1,
    crops: int = 1,
    over_clips: str = "mean",
    num_frames: int | None = None,
    crop_size: int | None = None,
    frame_step: int | None = None,
    short: str = "refuse",
    images: str = "repeat",
    device: str | torch.device | None = None,
    batch_size: int = 16,
    dtype: torch.dtype | None = None,
    storage: str = "float32",
    workers: int = 0,
    max_bad: float = 0.05,
    root: str | None = None,
    on_progress: Callable[[int, int], None] | None = None,
) -> VideoFeatures:
    """Frozen features of videos, the numbers of `extract_features`.

    ``vjepa_fast.features(encoder, videos, ...)`` and ``encoder.features(videos, ...)`` are the same.

    Args:
        encoder: of ``load_encoder``; it is in eval mode meanwhile, and stays on ``device``.
        videos: a video or image, a folder, a manifest, .tar shards, or several of these.
        pooling: as `pool_tokens`: "mean", "meanstd", "tdiff" and "sal" give ``[n, d]``; "time" (over space) gives
            ``[n, T, D]``; "none" every token, ``[n, T, H, W, D]``; "cls" the class token of encoders that have one,
            ``[n, E]``.
        level: "last", "all", or numbers of the encoder's levels from 0 (the L-th is the last); several stand side by
            side, D = levels * E.
        clips: of a video, spread over its time; 1 is the middle one.
        crops: of a clip, along its longer side; 1 is the middle one.
        over_clips: "mean" over the views, or "keep": ``[n, V, ...]``, view = clip * crops + crop.
        num_frames: of a clip. crop_size: pixels. frame_step: frames from one to the next. As trained unless given.
        short: "refuse" videos shorter than a clip (default), or "hold" their last frame.
        images: still images as standing clips ("repeat") or through the image embedding ("single").
        device: where the encoder is, unless given. batch_size: views at once. workers: reading threads.
        dtype: autocast; bfloat16 on CUDA and float32 elsewhere, unless given.
        storage: dtype of the result: float32, bfloat16 or float16.
        max_bad: share of the videos that may be unreadable; these are left out and listed.
        root: the folder that the paths of manifests start from and stay in.
        on_progress: told (videos dealt with, videos in all).

    Raises:
        DataError: no video, more than ``max_bad`` of them unreadable, or features that are not finite.
        UserError: an unknown pooling, level or storage, or features that do not fit the memory.
    """
    check_choice("pooling", pooling, WAYS)
    check_choice("over_clips", over_clips, CLIPS)
    check_choice("images", images, IMAGES)
    check_choice("storage", storage, STORAGE)
    if min(clips, crops, batch_size) < 1:
        raise UserError(f"views: {clips} clips x {crops} crops, {batch_size} at once; all must be at least 1")
    numbers = level_numbers(encoder, level)
    found = gather(videos, Root.given(root))
    manifest = found.manifest
    device, dtype = place_of(encoder, device, dtype)
    view = clip_view(encoder, num_frames, crop_size, frame_step, short=short)
    rest, single = dict(view), images == "single" and manifest.kind == "image"
    frames, crop = rest.pop("num_frames"), rest.pop("crop_size")
    bad = BadSamples([manifest], max_bad, "the accepted share (--max-bad)")
    deepest = numbers == [encoder.levels - 1]
    if pooling == CLS:
        check_wanted(encoder, [("last" if deepest else "all", CLS)])

    def pooled(z: Tensor, grid: tuple[int, int, int]) -> Tensor:
        z = z.float()
        if pooling == CLS:
            return z
        if not deepest:
            z = z.unflatten(-1, (encoder.levels, -1))[..., numbers, :].flatten(-2)
        if pooling == "none":
            return z.unflatten(1, grid)
        z = pool_tokens(z, grid, pooling)
        return z.unflatten(1, (grid[0], -1)) if pooling == "time" else z

    parts: list[Tensor] = []
    kept: list[int] = []
    grid = (0, 0, 0)
    per_batch = max(1, batch_size // (clips * crops))
    batches = eval_views(manifest, frames, crop, per_batch, clips=clips, crops=crops, workers=workers, bad=bad, **rest)
    with frozen(encoder, device, dtype):
        for clip, _, index in batches:
            clip = clip[:, :, :, :1] if single else clip
            depth = "last" if deepest else "all"
            how = {"device": device, "batch_size": batch_size, "level": depth, "summary": pooling == CLS}
            x, grid = encode_views(encoder, clip, pooled, **how)
            x = stored_as(x.mean(1) if over_clips == "mean" else x, STORAGE[storage], manifest.path)
            if not parts:
                hint = "pool them, name fewer videos, or store bfloat16"
                check_memory(manifest.path, len(manifest) * x[0].numel() * x.element_size(), hint)
            parts.append(x)
            kept += index.tolist()
            if on_progress is not None:
                on_progress(kept[-1] + 1, len(manifest))
    if not kept:
        raise DataError(f"{manifest.path}: no readable video; the first: {': '.join(bad.samples[0])}")
    mean, std = normalisation(encoder)
    settings = {
        "pooling": pooling,
        "levels": numbers,
        "blocks": [encoder.level_blocks[i] for i in numbers],
        "clips": clips if manifest.kind == "video" else 1,
        "crops": crops,
        "over_clips": over_clips,
        "grid": list(grid),
        **view,
        "images": images,
        "mean": list(mean),
        "std": list(std),
        "dtype": str(dtype).removeprefix("torch."),
        "storage": storage,
    }
    return VideoFeatures(
        torch.cat(parts),
        [os.path.abspath(p) if os.path.exists(p) else p for p in (manifest.paths[i] for i in kept)],
        torch.from_numpy(manifest.labels[kept]) if found.labelled else None,
        bad.samples,
        {"sha256": hash_weights(encoder)},
        settings,
    )


def level_numbers(encoder: VisionTransformer, level: str | int | Sequence[int]) -> list[int]:
    """Numbers of the levels that "last", "all", a number or numbers stand for. ConfigError for one there is not."""
    every = list(range(encoder.levels))
    if level in ("last", "all"):
        return every[-1:] if level == "last" else every
    numbers = [level] if isinstance(level, int) else level
    if isinstance(numbers, str) or not numbers or not set(numbers) <= set(every):
        raise ConfigError(
            f"level {level!r}: this encoder has the levels 0 to {every[-1]} (blocks "
            f"{', '.join(map(str, encoder.level_blocks))}); give such numbers, last or all"
        )
    return list(numbers)
