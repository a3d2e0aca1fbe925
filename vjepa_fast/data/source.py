"""One sample as uint8 frames, from a video or an image, through an optional cache of decoded files."""

from __future__ import annotations

import threading

import numpy as np

from vjepa_fast.data.decoders import Decoder, WholeVideo, choose_decoder, read_image
from vjepa_fast.data.media import ReadOptions, is_image_path
from vjepa_fast.data.sampling import Sampling
from vjepa_fast.errors import DataError

_LARGEST_SHARE = 1 / 16  # of the cache that one file may take


class SourceReader:
    """Reads samples of one kind of manifest; safe to call from several threads.

    Args:
        sampling: which frames of a video.
        cache_mb: memory for decoded files; it fills once and keeps what it has, which suits small data sets read many
            times. What is read does not depend on it.
        decoder: of videos; None: what ``data.decoder: auto`` uses.
        options: limits on images; those on videos are the decoder's.
    """

    def __init__(
        self, sampling: Sampling, cache_mb: int = 0, decoder: Decoder | None = None, options: ReadOptions | None = None
    ):
        self.sampling = sampling
        self.options = options or ReadOptions()
        self.decoder = decoder or choose_decoder(options=self.options)
        self._capacity = cache_mb * 1_000_000
        self._used = 0
        self._kept: dict[str, WholeVideo] = {}
        self._refused: set[str] = set()
        self._lock = threading.Lock()

    def read(
        self,
        path: str,
        kind: str,
        num_frames: int,
        start: str | float = "random",
        generator: np.random.Generator | None = None,
    ) -> np.ndarray:
        """uint8 ``[F, H, W, 3]``; ``[1, H, W, 3]`` for an image, which the caller repeats. DataError if unreadable."""
        kept = self._kept.get(path)
        if kind == "image":
            if kept is None:
                kept = WholeVideo(read_image(path, self.options)[None], fps=1.0, claimed=1)
                self._keep(path, kept)
            return kept.frames
        if is_image_path(path):
            raise DataError(f"{path}: is an image in a manifest of videos; put images in a manifest of their own")
        kept = kept or self._decode_whole(path)
        if kept is None:
            return self.decoder.read_clip(path, num_frames, self.sampling, start, generator)
        return kept.clip(path, num_frames, self.sampling, start, generator)

    def _decode_whole(self, path: str) -> WholeVideo | None:
        room = min(self._capacity - self._used, self._capacity * _LARGEST_SHARE)
        if room <= 0 or path in self._refused:
            return None
        try:
            video = self.decoder.read_video(path, int(room))
        except DataError:  # a damaged end need not spoil the clip wanted now
            video = None
        if video is None:
            self._refused.add(path)
            return None
        self._keep(path, video)
        return video

    def _keep(self, path: str, video: WholeVideo) -> None:
        size = video.frames.nbytes
        with self._lock:
            fits = size <= self._capacity * _LARGEST_SHARE and self._used + size <= self._capacity
            if fits and path not in self._kept:
                self._kept[path] = video
                self._used += size
