"""Deterministic clips for evaluation: the middle of the video, the centre of the frame, no mirroring; or several views
of each video: clips spread over its time, crops along its longer side.

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


def eval_clip(
    path: str | os.PathLike[str],
    num_frames: int,
    crop_size: int,
    *,
    frame_step: int | None = None,
    fps: int | None = None,
    duration: float | None = None,
    start: str | float = "center",
    decoder: str = "auto",
) -> torch.Tensor:
    """One clip of a video, or an image repeated, as uint8 ``[3, F, S, S]``: middle frames, centre view
    (``augment.centre_view``). ``start`` is "center" or the first frame's number; ``decoder`` as ``data.decoder``.
    DataError if it cannot be read.
    """
    reader = SourceReader(Sampling(frame_step, fps, duration), decoder=choose_decoder(decoder, "decoder"))
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
        workers: reading threads; the result does not depend on them.
        max_bad_fraction: unreadable samples are left out up to this share of the manifest.
        bad: collects the unreadable samples.
        decoder: as ``data.decoder``.

    Yields:
        (clip uint8 ``[B, V, 3, F, S, S]``, labels int64 ``[B]``, indices int64 ``[B]`` into the manifest), batches of
        ``batch_size`` but for the last.

    Raises:
        DataError: too many samples cannot be read.
    """
    sampling = Sampling(frame_step, fps, duration, spread, short)
    reader = SourceReader(sampling, decoder=choose_decoder(decoder, "decoder"))
    bad = bad if bad is not None else BadSamples([manifest], max_bad_fraction)
    starts = [(2 * i + 1) / (2 * clips) for i in range(clips)] if manifest.kind == "video" else [0.5]

    def read(path: str) -> torch.Tensor:
        clips = (reader.read(path, manifest.kind, num_frames, start) for start in starts)
        return _stack([view for frames in clips for view in _cut(frames, num_frames, crop_size, crops)])

    yield from _batches(manifest, range(first, len(manifest)), read, batch_size, workers, bad)


def _cut(frames: np.ndarray, num_frames: int, crop_size: int, crops: int) -> list[torch.Tensor]:
    """The views ``[3, F, S, S]`` of one clip; an image is repeated."""
    views = crop_views(frames.shape[1], frames.shape[2], crop_size, crops)
    return [apply_view(frames, view, crop_size).expand(-1, num_frames, -1, -1) for view in views]


def _stack(clips: list[torch.Tensor]) -> torch.Tensor:
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
