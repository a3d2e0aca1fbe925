"""The fast copy of a video: small, quick to decode, of constant rate, so that a clip is frames in a row."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from fractions import Fraction
from typing import TYPE_CHECKING

import numpy as np

from vjepa_fast.data.decoders import Video, choose_decoder
from vjepa_fast.data.decoders.rows import write_rows
from vjepa_fast.data.media import ReadOptions, one_line
from vjepa_fast.data.prepare.inspect import Facts, inspect
from vjepa_fast.errors import DataError
from vjepa_fast.files import atomic_path

if TYPE_CHECKING:
    from pathlib import Path

CODINGS = ("h264", "rows", "raw")
GOP = 16
_PIECE = 96_000_000  # bytes of frames that are decoded at a time
_PER_PIXEL = {"h264": 0.08, "rows": 0.3, "raw": 3.0}  # bytes at the default qualities; fine grain takes twice as much
_MOST_REPEATS = 50  # frames of a copy for each of the video's
_MOST_UNITS = 1001  # denominator of a rate, as in 30000/1001
_NEAR = 1e-6  # seconds; of two frames equally near in time, the earlier one is meant


@dataclass(frozen=True)
class CopyForm:
    """What copies are like.

    Attributes:
        coding: "h264"; "rows", a JPEG file per frame; "raw", uint8 per frame.
        fps: frames per second; of a video with fewer of constant rate, as many as it has. None: as the video.
        step: frames of the video from one frame of the copy to the next, where ``fps`` is None.
        short_side: pixels; smaller videos stay as they are, but for even sides.
        quality: crf of H.264 (lower is better), quality of JPEG (higher is better).
        deinterlaced: the second field of interlaced videos is filled.
    """

    coding: str = "h264"
    fps: Fraction | None = None
    step: int = 1
    short_side: int = 256
    quality: int = 20
    deinterlaced: bool = False

    @property
    def suffix(self) -> str:
        """Of the copies' files."""
        return ".mp4" if self.coding == "h264" else ".rows"

    @property
    def folder(self) -> str:
        """Name of the folder of such copies; another form has another."""
        rate = f"{str(self.fps).replace('/', 'over')}fps" if self.fps else f"step{self.step}"
        quality = "" if self.coding == "raw" else f"-q{self.quality}"
        return f"{self.coding}-{rate}-{self.short_side}px{quality}" + "-deinterlaced" * self.deinterlaced

    def frames(self, total: int, rate: float, times: np.ndarray | None) -> tuple[np.ndarray, Fraction]:
        """Which frames of a video the copy shows, and its rate.

        The n-th frame of the copy is the video's frame nearest in time to n / rate seconds after the first.

        Args:
            total: frames of the video.
            rate: its frames per second, the mean where it varies.
            times: float64 ``[total]``, seconds of each frame from the first, where the rate varies; else None.

        Returns:
            int64 ``[n]``, ascending, and frames per second.
        """
        own = Fraction(rate).limit_denominator(_MOST_UNITS) or Fraction(1, _MOST_UNITS)
        if self.fps is None and times is None:
            return np.arange(0, total, self.step), own / self.step
        fps = own / self.step if self.fps is None else self.fps
        if times is None:
            if fps >= own:
                return np.arange(total), own
            times = np.arange(total) / float(rate)
        wanted = np.arange(int((times[-1] + _NEAR) * fps) + 1) / float(fps)
        return np.searchsorted((times[1:] + times[:-1]) / 2, wanted - _NEAR).astype(np.int64), fps

    def size(self, height: int, width: int) -> tuple[int, int]:
        """(height, width) of the copy of a video of that size: both even."""
        share = min(1.0, self.short_side / min(height, width))
        return max(2, 2 * round(height * share / 2)), max(2, 2 * round(width * share / 2))

    def count(self, facts: Facts) -> int:
        """Frames that a copy will have, about."""
        fps = float(self.fps) if self.fps else facts.fps / self.step
        return max(1, int(facts.seconds * (min(fps, facts.fps) if facts.constant else fps)))

    def estimate(self, facts: Facts) -> int:
        """Bytes that a copy will take, about."""
        height, width = self.size(facts.height, facts.width)
        return int(self.count(facts) * height * width * _PER_PIXEL[self.coding]) + 2000

    def objection(self, path: str, facts: Facts) -> str:
        """Why a file has no copy, or nothing."""
        if facts.problem or self.count(facts) <= _MOST_REPEATS * facts.frames + 1000:
            return facts.problem
        return (
            f"{path}: lasts {facts.seconds / 3600:.1f} h with {facts.frames} frames, its time stamps seem to be "
            "damaged; repair it or leave it out"
        )


@dataclass(frozen=True)
class CopyTask:
    """One file to copy."""

    source: str
    target: Path


def is_made(task: CopyTask, source: list[int] | None) -> bool:
    """Whether the copy is there, and of its source as that is now.

    Args:
        task: which.
        source: `state` of the source when it was copied; None: not known, so the copy must not be older than it.
    """
    try:
        made, now = os.stat(task.target).st_mtime_ns, state(task.source)
    except OSError:
        return False
    return made >= now[1] if source is None else source == now


def state(path: str | os.PathLike[str]) -> list[int]:
    """Size and time of change of a file, in bytes and nanoseconds."""
    found = os.stat(path)
    return [found.st_size, found.st_mtime_ns]


def make_copy(task: CopyTask, form: CopyForm, options: ReadOptions) -> Facts:
    """Copy a video; what the copy is, or why there is none.

    Raises:
        UserError: the copy cannot be written; that will be so for all others too.
    """
    try:
        expected = _write(task, form, options)
    except DataError as error:
        return Facts(problem=str(error))
    facts = inspect(str(task.target), options=options)
    if not facts.problem and facts.frames != expected:
        facts = Facts(problem=f"{task.source}: its copy shows {facts.frames} frames instead of {expected}")
    if facts.problem:
        with suppress(OSError):
            task.target.unlink()
    return facts


def _write(task: CopyTask, form: CopyForm, options: ReadOptions) -> int:
    from av.error import FFmpegError

    with choose_decoder("pyav", options=options).open(task.source) as video:
        for attempt in (1, 2):
            numbers, rate = form.frames(video.info["frames"], video.info["fps"], video.times)
            size = form.size(video.info["height"], video.info["width"])
            try:
                pictures = _pictures(video, numbers, size)
                if form.coding == "h264":
                    _write_h264(task.target, pictures, size, rate, form.quality)
                else:
                    coding = "raw" if form.coding == "raw" else "jpeg"
                    count, fps = len(numbers), float(rate)
                    write_rows(
                        task.target, pictures, count=count, size=size, fps=fps, coding=coding, quality=form.quality
                    )
                return len(numbers)
            except DataError:
                if attempt == 2 or not video.recount():
                    raise
            except FFmpegError as error:
                if isinstance(error, OSError) and error.errno and error.errno > 0:
                    raise
                raise DataError(f"{task.source}: cannot be encoded ({one_line(error)})") from None
    raise AssertionError("the second attempt returns or raises")


def _pictures(video: Video, numbers: np.ndarray, size: tuple[int, int]) -> Iterator[np.ndarray]:
    """The frames of these numbers one after another; a piece is decoded at a time."""
    piece = max(GOP, _PIECE // (3 * size[0] * size[1]))
    for begin in range(0, len(numbers), piece):
        yield from video.read(numbers[begin : begin + piece], size)


def _write_h264(
    path: Path, pictures: Iterator[np.ndarray], size: tuple[int, int], rate: Fraction, quality: int
) -> None:
    import av
    from av.video.reformatter import ColorRange, Colorspace, VideoReformatter

    with atomic_path(path, sync=False) as temporary, av.open(str(temporary), "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=rate)
        stream.height, stream.width = size
        stream.pix_fmt = "yuv420p"
        codec = stream.codec_context
        codec.gop_size, codec.thread_count = GOP, 1
        codec.colorspace, codec.color_range = 6, 1  # BT.601, limited: what RGB is made of and read back by
        stream.options = {
            "crf": str(quality),
            "preset": "veryfast",
            "tune": "fastdecode",
            "bf": "0",
            "keyint_min": str(GOP),
            "sc_threshold": "0",
        }
        reformatter = VideoReformatter()
        for number, picture in enumerate(pictures):
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
            frame = reformatter.reformat(
                frame, format="yuv420p", dst_colorspace=Colorspace.ITU601, dst_color_range=ColorRange.MPEG, threads=1
            )
            frame.pts, frame.time_base = number, 1 / rate
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
