"""Which files are videos and which are images, and what is wrong with a file before any decoder looks at it."""

from __future__ import annotations

import os

from vjepa_fast.errors import DataError

VIDEO_SUFFIXES = frozenset({
    ".mp4", ".m4v", ".mov", ".mkv", ".webm", ".avi", ".mpg", ".mpeg", ".wmv", ".flv", ".ts", ".mts", ".3gp", ".ogv",
    ".gif"
})  # fmt: skip
IMAGE_SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff", ".ppm", ".pgm", ".jfif"})


def suffix_of(path: str) -> str:
    """The suffix in lower case, with its dot; empty where there is none."""
    return os.path.splitext(path)[1].lower()


def is_image_path(path: str) -> bool:
    """By its suffix; anything that is not an image's is taken for a video."""
    return suffix_of(path) in IMAGE_SUFFIXES


def check_file(path: str) -> None:
    """Raise DataError for a missing, unreadable or empty file and for a folder."""
    try:
        if os.path.isdir(path):
            raise DataError(f"{path}: is a folder, not a file")
        if os.stat(path).st_size == 0:
            raise DataError(f"{path}: the file is empty (0 bytes)")
    except OSError as error:
        raise DataError(f"{path}: {one_line(error)}") from None


def one_line(error: BaseException) -> str:
    """What a library or the operating system says about a file, in one line."""
    return " ".join(str(getattr(error, "strerror", None) or error).split())
