"""Where clips come from: a manifest, read in batches, or clips that are in memory already.

Shapes: n samples, B batch, F frames, S pixels.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import torch
from torch import Tensor

from vjepa_fast.data.manifests.manifest import Manifest
from vjepa_fast.data.views.evaluation import eval_batches
from vjepa_fast.errors import DataError
from vjepa_fast.models.vit import VisionTransformer

IN_MEMORY = 512 * 2**20  # bytes of decoded clips up to which a manifest is decoded once, not for every pass


@dataclass(frozen=True)
class ClipSet:
    """Decoded clips in memory: ``clips`` uint8 ``[n, 3, F, S, S]``, ``labels`` int64 ``[n]``; ``hash`` names the
    content.
    """

    clips: Tensor
    labels: np.ndarray
    hash: str
    name: str = "clips"
    images: bool = False  # still images repeated over the frames

    def __len__(self) -> int:
        return len(self.labels)


Source: TypeAlias = Manifest | ClipSet


def is_still(source: Source) -> bool:
    """Whether the samples are still images."""
    return source.images if isinstance(source, ClipSet) else source.kind == "image"


def clip_settings(encoder: VisionTransformer) -> dict:
    """``encoder.clip_settings`` (crop_size, num_frames, frame_step or fps or duration, mean, std); may be empty."""
    return dict(getattr(encoder, "clip_settings", None) or {})


def clip_view(
    encoder: VisionTransformer,
    num_frames: int | None,
    crop_size: int | None,
    frame_step: int | None,
    **more: str | None,
) -> dict:
    """The view that ``encoder`` was trained on, as arguments of ``data.eval_batches``, where the caller does not say
    otherwise. ``more``: spread, short, geometry.
    """
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


def fits_in_memory(samples: int, view: dict) -> bool:
    """Whether the decoded clips of so many samples take at most `IN_MEMORY` bytes."""
    return samples * 3 * view["num_frames"] * view["crop_size"] ** 2 <= IN_MEMORY


def decode_clips(manifest: Manifest, *, num_frames: int, crop_size: int, batch_size: int = 32, **view) -> ClipSet:
    """Decode a whole manifest's centre views into memory once (small data sets); ``view`` as
    ``data.eval_batches``. DataError where none can be read.
    """
    clips, labels = [], []
    for clip, label, _ in eval_batches(manifest, num_frames, crop_size, batch_size, **view):
        clips.append(clip)
        labels.append(torch.as_tensor(label))
    if not clips:
        raise DataError(f"{manifest.path}: no readable sample")
    digest = hashlib.sha256(f"{manifest.hash} {num_frames} {crop_size} {sorted(view.items())}".encode()).hexdigest()
    y = torch.cat(labels).numpy().astype(np.int64)
    return ClipSet(torch.cat(clips), y, digest, manifest.name, manifest.kind == "image")


def clip_batches(source: Source, batch_size: int, view: dict, workers: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
    """(clips uint8 ``[B, 3, F, S, S]``, labels int64 ``[B]``) of all readable samples in order. ``view`` as
    `clip_view` makes it; a ClipSet is taken as it is.
    """
    if isinstance(source, ClipSet):
        for start in range(0, len(source), batch_size):
            rows = slice(start, start + batch_size)
            yield source.clips[rows], torch.as_tensor(source.labels[rows])
        return
    rest = dict(view)
    frames, crop = rest.pop("num_frames"), rest.pop("crop_size")
    for clip, label, _ in eval_batches(source, frames, crop, batch_size, workers=workers, **rest):
        yield clip, torch.as_tensor(label)
