"""Deterministic clips for evaluation: the middle of the video, the centre of the frame, no mirroring; or several views
of each video: clips spread over its time, crops along its longer side.

What of a frame is shown is the geometry: "centre" (ours: ``augment.centre_view``), "short_side" (as the published
evaluation of arXiv:2605.17165 has it: the whole shorter side is scaled to the crop) or "native" (the frame as it is).

Legend: B samples, V views (clips * crops, the crops of one clip side by side), F frames, S crop size.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np
import torch

from vjepa_fast.data.bad_samples import BadSamples
from vjepa_fast.data.decoders import choose_decoder
from vjepa_fast.data.manifests.manifest import Manifest
from vjepa_fast.data.media import is_image_path
from vjepa_fast.data.sampling import Sampling
from vjepa_fast.data.source import SourceReader
from vjepa_fast.data.views.augment import apply_view, crop_views
from vjepa_fast.errors import DataError

GEOMETRIES = ("centre", "short_side", "native")


def eval_clip(
    path: str | os.PathLike[str],
    num_frames: int,
    crop_size: int,
    *,
    frame_step: int | None = None,
    fps: int | None = None,
    duration: float | None = None,
    short: str = "refuse",
    start: str | float = "center",
    decoder: str = "auto",
) -> torch.Tensor:
    """One clip of a video, or an image repeated, as uint8 ``[3, F, S, S]``: middle frames, centre view
    (``augment.centre_view``). ``short`` as in ``Sampling``; ``start`` is "center" or the first frame's number;
    ``decoder`` as ``data.decoder``. DataError if it cannot be read.
    """
    reader = SourceReader(Sampling(frame_step, fps, duration, short=short), decoder=choose_decoder(decoder, "decoder"))
    path = os.fspath(path)
    frames = reader.read(path, "image" if is_image_path(path) else "video", num_frames, start)
    return _cut(frames, num_frames, crop_size, 1)[0]


def eval_batches(
    manifest: Manifest, num_frames: int, crop_size: int, batch_size: int, **settings: Any
) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """As `eval_views`, with its other ``settings``, for the middle clip and centre view alone: ``[B, 3, F, S, S]``."""
    batches = eval_views(manifest, num_frames, crop_size, batch_size, **settings)
    return ((clips[:, 0], labels, indices) for clips, labels, indices in batches)


def eval_views(
    manifest: Manifest,
    num_frames: int,
    crop_size: int,
    batch_size: int,
    *,
    clips: int = 1,
    crops: int = 1,
    first: int = 0,
    frame_step: int | None = None,
    fps: int | None = None,
    duration: float | None = None,
    spread: str = "even",
    short: str = "refuse",
    geometry: str = "centre",
    workers: int = 0,
    max_bad_fraction: float = 0.05,
    bad: BadSamples | None = None,
    decoder: str = "auto",
) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """All samples of a manifest, once, in order, each in several views; view = clip * crops + crop.

    Args:
        manifest: whose samples are read.
        num_frames: frames per clip; images are repeated, 1 gives single frames.
        crop_size: pixels of each side of a view.
        batch_size: samples per batch.
        clips: of a video, from (2i + 1) / 2k of what fits on, so that one clip is the middle one. Images have one.
        crops: of a clip, as ``augment.crop_views``.
        first: the sample to begin with.
        frame_step, fps, duration, spread, short: see ``Sampling``.
        geometry: "centre", "short_side" or "native" (frames of any size, all the same); the latter two have one crop.
        workers: reading threads; the result does not depend on them.
        max_bad_fraction: unreadable samples are left out up to this share of the manifest.
        bad: collects the unreadable samples.
        decoder: as ``data.decoder``.

    Yields:
        (clip uint8 ``[B, V, 3, F, S, S]``, labels int64 ``[B]``, indices int64 ``[B]`` into the manifest), batches of
        ``batch_size`` but for the last.

    Raises:
        DataError: too many samples cannot be read, an unknown geometry, or frames of unequal sizes under "native".
    """
    if geometry not in GEOMETRIES or (geometry != "centre" and crops != 1):
        raise DataError(
            f"geometry {geometry!r} with {crops} crops; expected {', '.join(GEOMETRIES)}, several crops of centre"
        )
    sampling = Sampling(frame_step, fps, duration, spread, short)
    reader = SourceReader(sampling, decoder=choose_decoder(decoder, "decoder"))
    bad = bad if bad is not None else BadSamples([manifest], max_bad_fraction)
    starts = [(2 * i + 1) / (2 * clips) for i in range(clips)] if manifest.kind == "video" else [0.5]

    def cut(frames: np.ndarray) -> list[torch.Tensor]:
        if geometry == "centre":
            return _cut(frames, num_frames, crop_size, crops)
        one = (
            _channels_first(frames) if geometry == "native" else short_side(frames, crop_size, manifest.kind == "image")
        )
        return [one.expand(-1, num_frames, -1, -1)]

    def read(path: str) -> torch.Tensor:
        clips = (reader.read(path, manifest.kind, num_frames, start) for start in starts)
        return _stack([view for frames in clips for view in cut(frames)])

    yield from _batches(manifest, range(first, len(manifest)), read, batch_size, workers, bad)


def _cut(frames: np.ndarray, num_frames: int, crop_size: int, crops: int) -> list[torch.Tensor]:
    """The views ``[3, F, S, S]`` of one clip; an image is repeated."""
    views = crop_views(frames.shape[1], frames.shape[2], crop_size, crops)
    return [apply_view(frames, view, crop_size).expand(-1, num_frames, -1, -1) for view in views]


def short_side(frames: np.ndarray, crop_size: int, still: bool) -> torch.Tensor:
    """uint8 ``[F, H, W, 3]`` -> uint8 ``[3, F, S, S]``: the shorter side scaled to S, the middle of the longer one.

    Videos: bilinear without antialias to ``int(side * S / shorter side)``. Still images: Pillow's bicubic and the
    rounding of torchvision's ``Resize`` and ``CenterCrop``, which the published evaluation uses.
    """
    height, width = frames.shape[1:3]
    short = min(height, width)
    high, wide = (int(side * crop_size / short) for side in (height, width))
    if still:
        from PIL import Image

        top, left = (round((side - crop_size) / 2) for side in (high, wide))
        scaled = [Image.fromarray(f).resize((wide, high), Image.Resampling.BICUBIC) for f in frames]
        box = np.stack([np.asarray(f)[top : top + crop_size, left : left + crop_size] for f in scaled])
        return _channels_first(box)
    top, left = ((side - crop_size) // 2 for side in (high, wide))
    x_FCHW = torch.from_numpy(np.ascontiguousarray(frames)).permute(0, 3, 1, 2).float()
    x_FCHW = torch.nn.functional.interpolate(x_FCHW, size=(high, wide), mode="bilinear", align_corners=False)
    box_FCSS = x_FCHW[:, :, top : top + crop_size, left : left + crop_size].round().to(torch.uint8)
    return torch.from_numpy(np.ascontiguousarray(box_FCSS.permute(1, 0, 2, 3).numpy()))


def _channels_first(frames: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(frames.transpose(3, 0, 1, 2)))


def _stack(clips: list[torch.Tensor]) -> torch.Tensor:
    if len({clip.shape for clip in clips}) > 1:
        sizes = sorted({f"{clip.shape[-1]}x{clip.shape[-2]}" for clip in clips})
        raise DataError(f"clips of unequal sizes ({', '.join(sizes)}) cannot be read at their native size")
    return torch.from_numpy(np.stack([clip.numpy() for clip in clips]))  # copied in this thread, as in `apply_view`


def _batches(
    manifest: Manifest, rows: range, read: Callable[[str], torch.Tensor], batch_size: int, workers: int, bad: BadSamples
) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    clips: list[torch.Tensor] = []
    kept: list[int] = []
    for index, clip, reason in _in_order(manifest, rows, read, workers, 2 * batch_size):
        bad.add(0, index, manifest.paths[index], reason)
        if clip is not None:
            clips.append(clip)
            kept.append(index)
        if kept and (len(kept) == batch_size or index == rows[-1]):
            yield _stack(clips), torch.from_numpy(manifest.labels[kept]), torch.tensor(kept)
            clips, kept = [], []


def _in_order(manifest: Manifest, rows: range, read: Callable[[str], torch.Tensor], workers: int, ahead: int):
    def load(index: int):
        try:
            return index, read(manifest.paths[index]), None
        except DataError as error:
            return index, None, str(error)

    if workers <= 0:
        yield from map(load, rows)
        return
    with ThreadPoolExecutor(workers, "vjepa-fast-eval") as pool:
        queue: deque[Future] = deque()
        try:
            for index in rows:
                queue.append(pool.submit(load, index))
                if len(queue) > ahead:
                    yield queue.popleft().result()
            while queue:
                yield queue.popleft().result()
        finally:
            for future in queue:
                future.cancel()
