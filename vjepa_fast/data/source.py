"""One sample as uint8 frames, from a video or an image, through an optional cache of decoded files."""

from __future__ import annotations

import threading

import numpy as np

from vjepa_fast.data.decoders.pyav import Sampling, WholeVideo, read_clip, read_image, read_video
from vjepa_fast.data.manifests.manifest import is_image_path
from vjepa_fast.errors import DataError

_LARGEST_SHARE = 1 / 16  # of the cache that one file may take


class SourceReader:
    """Reads samples of one kind of manifest; safe to call from several threads.

    Args:
        sampling: which frames of a video.
        cache_mb: memory for decoded files; it fills once and keeps what it has, so it serves small data sets read many
            times. What is read does not depend on it.
    """

    def __init__(self, sampling: Sampling, cache_mb: int = 0):
        self.sampling = sampling
        self._capacity = cache_mb * 1_000_000
        self._used = 0
        self._kept: dict[str, np.ndarray | WholeVideo] = {}
        self._refused: set[str] = set()
        self._lock = threading.Lock()

    def read(
        self,
        path: str,
        kind: str,
        num_frames: int,
        start: str | int | float = "random",
        generator: np.random.Generator | None = None,
    ) -> np.ndarray:
        """uint8 ``[F, H, W, 3]``; ``[1, H, W, 3]`` for an image, which the caller repeats. DataError if unreadable."""
        if kind == "image":
            kept = self._kept.get(path)
            if kept is None:
                kept = read_image(path)[None]
                self._keep(path, kept, kept.nbytes)
            return kept
        if is_image_path(path):
            raise DataError(f"{path}: is an image in a manifest of videos; put images in a manifest of their own")
        video = self._kept.get(path) or self._decode_whole(path)
        if video is None:
            return read_clip(path, num_frames, start=start, generator=generator, sampling=self.sampling)
        return video.clip(path, num_frames, start, generator, self.sampling)

    def _decode_whole(self, path: str) -> WholeVideo | None:
        room = min(self._capacity - self._used, self._capacity * _LARGEST_SHARE)
        if room <= 0 or path in self._refused:
            return None
        try:
            video = read_video(path, int(room))
        except DataError:  # a damaged end need not spoil the clip wanted now
            video = None
        if video is None:
            self._refused.add(path)
            return None
        self._keep(path, video, video.frames.nbytes)
        return video

    def _keep(self, path: str, value: np.ndarray | WholeVideo, size: int) -> None:
        with self._lock:
            if (
                path not in self._kept
                and size <= self._capacity * _LARGEST_SHARE
                and self._used + size <= self._capacity
            ):
                self._kept[path] = value
                self._used += size
