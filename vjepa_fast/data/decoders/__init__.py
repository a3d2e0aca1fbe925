"""Decoders of videos by name (``data.decoder``), and reading one clip, video or image.

Adding a decoder: derive from `Decoder`, register it (``@DECODERS.register("mine")``) in a module of this folder or in a
plugin, and ``data.decoder: mine`` uses it; tests/data/test_decoders.py checks every registered one.
"""

from __future__ import annotations

import os

import numpy as np

from vjepa_fast.data.decoders.api import (
    DECODERS,
    BatchDecoder,
    Decoder,
    Facts,
    Request,
    Video,
    VideoInfo,
    WholeVideo,
    choose_decoder,
)
from vjepa_fast.data.decoders.image import read_image
from vjepa_fast.data.decoders.index import FrameIndex
from vjepa_fast.data.decoders.index_cache import index_of
from vjepa_fast.data.sampling import Sampling

__all__ = [
    "DECODERS",
    "BatchDecoder",
    "Decoder",
    "Facts",
    "FrameIndex",
    "Request",
    "Video",
    "VideoInfo",
    "WholeVideo",
    "choose_decoder",
    "index_of",
    "probe_video",
    "read_clip",
    "read_image",
]


def read_clip(
    path: str | os.PathLike[str],
    num_frames: int,
    frame_step: int | None = None,
    *,
    fps: int | None = None,
    duration: float | None = None,
    start: str | float = "random",
    size: int | tuple[int, int] | None = None,
    generator: np.random.Generator | None = None,
    sampling: Sampling | None = None,
    decoder: str = "auto",
) -> np.ndarray:
    """Read one clip of a video, uint8 ``[F, H, W, 3]``, RGB.

    At most one of ``frame_step``, ``fps`` and ``duration`` says which frames (see ``Sampling``), or ``sampling`` in
    their place; ``start`` and ``generator`` where the clip begins (see ``Sampling.indices``); ``size`` (height, width)
    to what it is scaled (bilinear, one number for a square).

    Raises:
        DataError: a missing, empty, truncated, audio-only or too short file, or one that is no video.
        ConfigError: there is no such decoder, or it cannot be used here.
    """
    size = (size, size) if isinstance(size, int) else size
    sampling = sampling or Sampling(frame_step, fps, duration)
    reader = choose_decoder(decoder, "decoder")
    return reader.read_clip(os.fspath(path), num_frames, sampling, start, generator, size)


def probe_video(path: str | os.PathLike[str], decoder: str = "auto") -> VideoInfo:
    """``{"frames", "fps", "height", "width", "codec"}``: frames counted, size as shown. Errors as `read_clip`."""
    return choose_decoder(decoder, "decoder").probe(os.fspath(path))
