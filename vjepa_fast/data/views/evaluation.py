"""Deterministic clips for evaluation: the middle of the video, the centre of the frame, no mirroring; or several views
of each video: clips spread over its time, crops along its longer side.

Legend: B samples, V views (clips * crops, the crops of one clip side by side), F frames, S crop size.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial

import numpy as np
import torch

from vjepa_fast.data.bad_samples import BadSamples
from vjepa_fast.data.decoders import choose_decoder
from vjepa_fast.data.manifests.manifest import Manifest
from vjepa_fast.data.media import is_image_path
from vjepa_fast.data.sampling import Sampling
from vjepa_fast.data.source import SourceReader
from vjepa_fast.data.views.augment import apply_view, centre_view, crop_views
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
    return _view(reader, "image" if is_image_path(path) else "video", num_frames, crop_size, path, start)


def eval_batches(
    manifest: Manifest,
    num_frames: int,
    crop_size: int,
    batch_size: int,
    *,
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
    """All samples of a manifest, once, in order.

    Args:
        manifest: whose samples are read.
        num_frames: frames per clip; images are repeated, 1 gives single frames.
        crop_size: pixels of each side of the view (``augment.centre_view``).
        batch_size: samples per batch.
        frame_step: see ``Sampling``, as for the next four.
        fps: frames per second to read at.
        duration: seconds that a clip spans.
        spread: of the frames.
        short: what happens to a video shorter than the clip.
        workers: reading threads; the result does not depend on them.
        max_bad_fraction: unreadable samples are left out up to this share of the manifest.
        bad: collects the unreadable samples.
        decoder: as ``data.decoder``.

    Yields:
        (clip uint8 ``[B, 3, F, S, S]``, labels int64 ``[B]``, indices int64 ``[B]`` into the manifest), batches of
        ``batch_size`` but for the last.

    Raises:
        DataError: too many samples cannot be read.
    """
    sampling = Sampling(frame_step, fps, duration, spread, short)
    reader = SourceReader(sampling, decoder=choose_decoder(decoder, "decoder"))
    bad = bad if bad is not None else BadSamples([manifest], max_bad_fraction)
    read = partial(_view, reader, manifest.kind, num_frames, crop_size)
    yield from _batches(manifest, range(len(manifest)), read, batch_size, workers, bad)


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
    """As :func:`eval_batches` with several views of each sample: uint8 ``[B, V, 3, F, S, S]``, view = clip * crops +
    crop.

    The clips start at (2i + 1) / 2k of what fits, so that one clip is the middle one; crops as ``augment.crop_views``.
    Images have one clip. ``first``: the sample of the manifest to begin with.
    """
    sampling = Sampling(frame_step, fps, duration, spread, short)
    reader = SourceReader(sampling, decoder=choose_decoder(decoder, "decoder"))
    bad = bad if bad is not None else BadSamples([manifest], max_bad_fraction)
    clips = 1 if manifest.kind == "image" else clips
    read = partial(_views, reader, manifest.kind, num_frames, crop_size, clips, crops)
    yield from _batches(manifest, range(first, len(manifest)), read, batch_size, workers, bad)


def _view(
    reader: SourceReader, kind: str, num_frames: int, crop_size: int, path: str, start: str | float = "center"
) -> torch.Tensor:
    frames = reader.read(path, kind, num_frames, start)
    return _lasting(apply_view(frames, centre_view(frames.shape[1], frames.shape[2], crop_size), crop_size), num_frames)


def _views(
    reader: SourceReader, kind: str, num_frames: int, crop_size: int, clips: int, crops: int, path: str
) -> torch.Tensor:
    views = []
    for i in range(clips):
        frames = reader.read(path, kind, num_frames, (2 * i + 1) / (2 * clips))
        views += [
            _lasting(apply_view(frames, view, crop_size), num_frames)
            for view in crop_views(frames.shape[1], frames.shape[2], crop_size, crops)
        ]
    return torch.from_numpy(np.stack([view.numpy() for view in views]))


def _lasting(clip: torch.Tensor, num_frames: int) -> torch.Tensor:
    return clip if clip.shape[1] == num_frames else clip.expand(-1, num_frames, -1, -1)


def _batches(
    manifest: Manifest,
    rows: Iterable[int],
    read: Callable[[str], torch.Tensor],
    batch_size: int,
    workers: int,
    bad: BadSamples,
):
    clips, kept = [], []
    for index, clip, reason in _in_order(manifest, rows, read, workers, 2 * batch_size):
        bad.add(0, index, manifest.paths[index], reason)
        if clip is not None:
            clips.append(clip)
            kept.append(index)
        if len(kept) == batch_size:
            yield _batch(manifest, clips, kept)
            clips, kept = [], []
    if kept:
        yield _batch(manifest, clips, kept)


def _in_order(manifest: Manifest, rows: Iterable[int], read: Callable[[str], torch.Tensor], workers: int, ahead: int):
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


def _batch(manifest: Manifest, clips: list[torch.Tensor], kept: list[int]):
    clip = torch.from_numpy(np.stack([c.numpy() for c in clips]))
    return clip, torch.from_numpy(manifest.labels[kept]), torch.tensor(kept)
