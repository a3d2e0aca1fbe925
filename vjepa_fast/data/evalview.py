"""Deterministic clips for evaluation: the middle of the video, the centre of the frame, no mirroring."""
from __future__ import annotations

import os
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
import torch

from ..errors import DataError
from .augment import apply_view, centre_view
from .bad import BadSamples
from .decode_pyav import Sampling
from .manifest import Manifest, is_image_path
from .source import SourceReader


def eval_clip(path: str | os.PathLike, num_frames: int, crop_size: int, *, frame_step: int | None = None,
              fps: int | None = None, duration: float | None = None, start: str | int = "center") -> torch.Tensor:
    """One clip of a video, or an image repeated, as uint8 ``[3, F, S, S]``: middle frames, centre view
    (``augment.centre_view``). ``start`` is "center" or the first frame's number. DataError if it cannot be read."""
    reader = SourceReader(Sampling(frame_step, fps, duration))
    path = os.fspath(path)
    return _view(reader, path, "image" if is_image_path(path) else "video", num_frames, crop_size, start)


def eval_batches(manifest: Manifest, num_frames: int, crop_size: int, batch_size: int, *,
                 frame_step: int | None = None, fps: int | None = None, duration: float | None = None,
                 workers: int = 0, max_bad_fraction: float = 0.05, bad: BadSamples | None = None,
                 ) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """All samples of a manifest, once, in order.

    Args:
        num_frames: frames per clip; images are repeated, 1 gives single frames.
        workers: reading threads; the result does not depend on them.
        max_bad_fraction: unreadable samples are left out up to this share of the manifest.
        bad: collects the unreadable samples.

    Yields:
        (clip uint8 ``[B, 3, F, S, S]``, labels int64 ``[B]``, indices int64 ``[B]`` into the manifest), batches of
        ``batch_size`` but for the last.

    Raises:
        DataError: too many samples cannot be read.
    """
    reader = SourceReader(Sampling(frame_step, fps, duration))
    bad = bad if bad is not None else BadSamples([manifest], max_bad_fraction)
    clips, kept = [], []
    for index, clip, reason in _in_order(manifest, reader, num_frames, crop_size, workers, 2 * batch_size):
        bad.add(0, index, manifest.paths[index], reason)
        if clip is not None:
            clips.append(clip)
            kept.append(index)
        if len(kept) == batch_size:
            yield _batch(manifest, clips, kept)
            clips, kept = [], []
    if kept:
        yield _batch(manifest, clips, kept)


def _view(reader: SourceReader, path: str, kind: str, num_frames: int, crop_size: int,
          start: str | int) -> torch.Tensor:
    frames = reader.read(path, kind, num_frames, start)
    clip = apply_view(frames, centre_view(frames.shape[1], frames.shape[2], crop_size), crop_size)
    return clip if clip.shape[1] == num_frames else clip.expand(-1, num_frames, -1, -1)


def _in_order(manifest: Manifest, reader: SourceReader, num_frames: int, crop_size: int, workers: int, ahead: int):
    def load(index: int):
        try:
            return index, _view(reader, manifest.paths[index], manifest.kind, num_frames, crop_size, "center"), None
        except DataError as error:
            return index, None, str(error)

    if workers <= 0:
        yield from map(load, range(len(manifest)))
        return
    with ThreadPoolExecutor(workers, "vjepa-fast-eval") as pool:
        queue: deque[Future] = deque()
        try:
            for index in range(len(manifest)):
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
