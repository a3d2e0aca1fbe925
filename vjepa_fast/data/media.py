"""Which files are videos and which are images, what is read of them, and what is wrong before any decoder looks."""

from __future__ import annotations

import os
from dataclasses import dataclass, fields

import numpy as np

from vjepa_fast.config.schema import DataConfig
from vjepa_fast.data import members
from vjepa_fast.errors import DataError

VIDEO_SUFFIXES = frozenset({
    ".mp4", ".m4v", ".mov", ".mkv", ".webm", ".avi", ".mpg", ".mpeg", ".wmv", ".flv", ".ts", ".mts", ".3gp", ".ogv",
    ".gif"
})  # fmt: skip
IMAGE_SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff", ".ppm", ".pgm", ".jfif"})


@dataclass(frozen=True)
class ReadOptions:
    """How files are read, and what is too much; the keys of the same names in ``data``.

    Attributes:
        corrupt: "refuse" frames that are damaged or painted over by the decoder, or "keep" them.
        deinterlace: fill the second field of interlaced frames from the first.
        max_pixels: of one picture.
        max_seconds: for one sample.
        max_clip_mb: memory of one decoded clip, in millions of bytes.
    """

    corrupt: str = "refuse"
    deinterlace: bool = False
    max_pixels: int = 64_000_000
    max_seconds: float = 120.0
    max_clip_mb: int = 2000

    @classmethod
    def of(cls, data: DataConfig) -> ReadOptions:
        """What a section of a recipe says."""
        return cls(**{f.name: getattr(data, f.name) for f in fields(cls)})

    def check_size(self, path: str, width: int, height: int) -> None:
        """Raise DataError for a picture of more than ``max_pixels``."""
        if width * height > self.max_pixels:
            raise DataError(
                f"{path}: {width} x {height} pixels are over data.max_pixels {self.max_pixels}; "
                "scale it down, or raise the limit"
            )

    def check_clip(self, path: str, frames: int, height: int, width: int) -> None:
        """Raise DataError for a clip of more than ``max_clip_mb``."""
        if (size := 3 * frames * height * width / 1e6) > self.max_clip_mb:
            raise DataError(
                f"{path}: {frames} frames of {width} x {height} pixels take {size:.0f} MB, over data.max_clip_mb "
                f"{self.max_clip_mb}; scale the video down, ask for fewer frames, or raise the limit"
            )


def suffix_of(path: str) -> str:
    """The suffix in lower case, with its dot; empty where there is none."""
    return os.path.splitext(path)[1].lower()


def is_image_path(path: str) -> bool:
    """By its suffix; anything that is not an image's is taken for a video."""
    return suffix_of(path) in IMAGE_SUFFIXES


def check_file(path: str) -> None:
    """Raise DataError for a missing, unreadable or empty file, a folder, and a member of a shard with a flaw."""
    try:
        if (member := members.member_of(path)) is not None and member.flaw:
            raise DataError(f"{path}: {members.FLAWS[member.flaw]}")
        if os.path.isdir(path):
            raise DataError(f"{path}: is a folder, not a file")
        if members.stat_of(path)[0] == 0:
            raise DataError(f"{path}: the file is empty (0 bytes)")
    except OSError as error:
        raise DataError(f"{path}: {one_line(error)}") from None


def read_bytes(path: str) -> np.ndarray:
    """The content of a file, uint8 ``[N]``. DataError if it cannot be read."""
    try:
        return np.frombuffer(members.read_bytes(path), np.uint8)
    except OSError as error:
        raise DataError(f"{path}: {one_line(error)}") from None


def one_line(error: BaseException) -> str:
    """What a library or the operating system says about a file, in one line."""
    return " ".join(str(getattr(error, "strerror", None) or error).split())
