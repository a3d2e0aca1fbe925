"""What a file is: its codec, size, frames and rate, or why it cannot be used."""

from __future__ import annotations

import os
from dataclasses import dataclass, field, replace

import numpy as np

from vjepa_fast.data.decoders import FrameIndex, choose_decoder, read_image
from vjepa_fast.data.decoders.image import open_image
from vjepa_fast.data.decoders.index_cache import INDICES
from vjepa_fast.data.decoders.rows import is_rows
from vjepa_fast.data.media import ReadOptions, check_file, is_image_path, one_line
from vjepa_fast.errors import DataError


@dataclass(frozen=True)
class Facts:
    """Of one file.

    Attributes:
        problem: why it cannot be used; empty if it can.
        codec: FFmpeg's name, or Pillow's of an image. width, height: as shown.
        frames, fps: 1 and 0 of an image. constant: whether the rate is. gop: most packets from a key frame to the next.
        bytes: size of the file.
        index: of a video, kept for the manifest's sidecar.
    """

    problem: str = ""
    codec: str = ""
    width: int = 0
    height: int = 0
    frames: int = 0
    fps: float = 0.0
    constant: bool = True
    gop: int = 0
    bytes: int = 0
    index: FrameIndex | None = field(default=None, repr=False, compare=False)

    @property
    def seconds(self) -> float:
        """How long it lasts; 0 for an image."""
        return self.frames / self.fps if self.fps else 0.0


def inspect(path: str, full: bool = False, options: ReadOptions | None = None) -> Facts:
    """What a file is. A file that cannot be used is no error here, but a `Facts.problem`.

    Args:
        path: video, image or row store.
        full: decode all of it; else the packets of a video are read and its first frame decoded, and of an image the
            header is read.
        options: how, and limits.
    """
    options = options or ReadOptions()
    try:
        check_file(path)
        size = os.path.getsize(path)
        if is_image_path(path):
            codec, width, height = _header(path, options)
            if full:
                read_image(path, options)
            return Facts(codec=codec, width=width, height=height, frames=1, gop=1, bytes=size)
        reader = choose_decoder("pyav", options=options)
        info = reader.probe(path)
        if full:
            reader.verify(path, lambda share: None)
    except (DataError, OSError) as error:
        return Facts(problem=str(error) if isinstance(error, DataError) else f"{path}: {one_line(error)}")
    index = None if is_rows(path) else INDICES.known(path)
    facts = Facts(
        codec=info["codec"],
        width=info["width"],
        height=info["height"],
        frames=info["frames"],
        fps=info["fps"],
        gop=1,
        bytes=size,
    )
    if index is None:
        return facts
    gop = int(np.diff(index.key, append=index.packets).max(initial=1))
    return replace(facts, frames=index.frames, constant=index.constant, gop=gop, index=index)


def _header(path: str, options: ReadOptions) -> tuple[str, int, int]:
    """(codec, width, height) of an image."""
    try:
        with open_image(path) as image:
            codec, (width, height) = (image.format or "image").lower(), image.size
    except Exception as error:  # Pillow raises all sorts on damaged data
        raise DataError(f"{path}: is not a readable image ({one_line(error)})") from None
    options.check_size(path, width, height)
    return codec, width, height
