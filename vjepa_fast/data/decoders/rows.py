"""The row store: one file per video, one row of bytes per frame, read through a memory map without any decoder's state.

    8 bytes    b"VJROWS01"
    8 bytes    length of the head, little-endian
    head       JSON: frames, fps, height, width, coding ("jpeg" or "raw")
    8 x (N+1)  where each row begins, counted from the first; little-endian
    rows       JPEG files, or uint8 [height, width, 3]

`vjepa-fast prepare --convert rows` writes it. Whichever decoder a run names, files that end in ``.rows`` are read here.
"""

from __future__ import annotations

import io
import json
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

import numpy as np

from vjepa_fast.data.decoders.api import Video, VideoInfo
from vjepa_fast.data.media import ReadOptions, check_file, one_line
from vjepa_fast.data.members import member_of
from vjepa_fast.errors import DataError
from vjepa_fast.files import atomic_path, parse_json

CODINGS = ("jpeg", "raw")
_MAGIC = b"VJROWS01"
_LONGEST_HEAD = 10_000


def write_rows(
    path: str | Path,
    frames: Iterable[np.ndarray],
    *,
    count: int,
    size: tuple[int, int],
    fps: float,
    coding: str = "jpeg",
    quality: int = 90,
) -> None:
    """Write frames, uint8 ``[height, width, 3]``, that come one after another.

    Args:
        path: of the file.
        frames: exactly ``count`` of them.
        count, size, fps: number, (height, width) and frames per second.
        coding: "jpeg" or "raw".
        quality: of JPEG, to 95.

    Raises:
        UserError: the file cannot be written.
        ValueError: there are more or fewer frames, or one has another size.
    """
    from PIL import Image

    begin, done = np.zeros(count + 1, "<u8"), 0
    head = json.dumps(dict(frames=count, fps=fps, height=size[0], width=size[1], coding=coding)).encode()
    start = _MAGIC + len(head).to_bytes(8, "little") + head
    with atomic_path(path, sync=False) as temporary, open(temporary, "wb") as file:
        file.write(start + begin.tobytes())
        first = file.tell()
        for frame in frames:
            if frame.shape != (*size, 3) or done == count:
                raise ValueError(f"frame {done} of {count} is {frame.shape}, expected {(*size, 3)}")
            if coding == "jpeg":
                Image.fromarray(frame).save(file, format="JPEG", quality=quality, subsampling="4:2:0")
            else:
                file.write(np.ascontiguousarray(frame).tobytes())
            done += 1
            begin[done] = file.tell() - first
        if done != count:
            raise ValueError(f"{done} frames, expected {count}")
        file.seek(len(start))
        file.write(begin.tobytes())


class RowVideo(Video):
    """A video in a row store.

    Raises:
        DataError: the file is missing, cut short, or no row store.
    """

    def __init__(self, path: str, options: ReadOptions) -> None:
        check_file(path)
        if member_of(path) is not None:
            raise DataError(f"{path}: a row store is read by memory map, not from a shard; unpack it")
        with _opened(path) as file:
            start = file.read(16)
            length = int.from_bytes(start[8:], "little")
            if start[:8] != _MAGIC or length > _LONGEST_HEAD:
                raise DataError(f"{path}: is no row store; write it anew with vjepa-fast prepare --convert rows")
            count, begin, info = 0, None, None
            try:
                head = parse_json(file.read(length))
                count, self._raw = int(head["frames"]), head["coding"] == "raw"
                if 8 * count > os.path.getsize(path):
                    raise ValueError("more frames than there can be")
                begin = np.frombuffer(file.read(8 * (count + 1)), "<u8")
                info = VideoInfo(
                    frames=count,
                    fps=float(head["fps"]),
                    height=int(head["height"]),
                    width=int(head["width"]),
                    codec=f"rows, {head['coding']}",
                )
            except (ValueError, KeyError, TypeError, MemoryError, OverflowError):
                info = None
            self._first = file.tell()
        if info is None or begin is None or len(begin) != count + 1 or count < 1:
            raise DataError(f"{path}: the row store is damaged; write it anew")
        if (np.diff(begin.astype(np.int64)) <= 0).any() or self._first + int(begin[-1]) != os.path.getsize(path):
            raise DataError(f"{path}: the row store is cut short or damaged; write it anew")
        super().__init__(path, info)
        self.options, self._begin = options, begin
        options.check_size(path, info["width"], info["height"])

    def read(self, numbers: np.ndarray, size: tuple[int, int] | None) -> np.ndarray:
        """As ``Video.read``; only the rows of these frames are touched."""
        from PIL import Image

        height, width = self.info["height"], self.info["width"]
        self.options.check_clip(self.path, len(numbers), *(size or (height, width)))
        try:
            mapped = np.memmap(self.path, np.uint8, "r", self._first)
        except (OSError, ValueError) as error:  # gone, or another file by now
            raise DataError(f"{self.path}: {one_line(error)}") from None
        clip = np.empty((len(numbers), *(size or (height, width)), 3), np.uint8)
        for place, number in enumerate(numbers.tolist()):
            row = mapped[int(self._begin[number]) : int(self._begin[number + 1])]
            picture = self._picture(row, number, (height, width, 3))
            if size is not None and size != (height, width):
                picture = np.asarray(Image.fromarray(picture).resize((size[1], size[0]), Image.Resampling.BILINEAR))
            clip[place] = picture
        return clip

    def _picture(self, row: np.ndarray, number: int, shape: tuple[int, int, int]) -> np.ndarray:
        from PIL import Image

        try:
            if self._raw:
                return np.asarray(row).reshape(shape)
            with Image.open(io.BytesIO(row.tobytes()), formats=("JPEG",)) as image:
                picture = np.asarray(image.convert("RGB")) if image.size == (shape[1], shape[0]) else None
        except (OSError, ValueError, SyntaxError):
            picture = None
        if picture is None or picture.shape != shape:
            raise DataError(f"{self.path}: the row of frame {number} is damaged; write the row store anew")
        return picture


def _opened(path: str) -> BinaryIO:
    try:
        return open(path, "rb")
    except OSError as error:
        raise DataError(f"{path}: {one_line(error)}") from None


def is_rows(path: str) -> bool:
    """Whether a path is that of a row store."""
    return path.endswith(".rows")


@contextmanager
def open_rows(path: str, options: ReadOptions) -> Iterator[Video]:
    """Open a row store for the ``with`` block. Errors as `RowVideo`."""
    yield RowVideo(path, options)
