"""Reading clips from video files with PyAV, frame-exact, and images with Pillow.

One decoding thread per call: call it from several threads instead, PyAV releases the interpreter lock. Frame counts
and rates come from the container's header.
"""

from __future__ import annotations

import math
import numbers
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np

from vjepa_fast.data.manifests.manifest import IMAGE_SUFFIXES, VIDEO_SUFFIXES, is_image_path
from vjepa_fast.errors import DataError

# codecs without prediction between frames: unwanted packets need no decoding
_INTRA = frozenset({"mjpeg", "png", "ffv1", "prores", "rawvideo", "dnxhd", "huffyuv"})


@dataclass(frozen=True)
class Sampling:
    """Which frames make a clip: at most one of the three, a step of 1 if none.

    Attributes:
        frame_step: frames from one to the next.
        fps: frames per second to read at: the step is max(1, ceil(video fps) // fps), as published.
        duration: seconds that a clip spans: the step is max(1, int(duration * ceil(video fps) / num_frames)).
        spread: "even": start + i * step. "published": the published code's integers of a linspace over
            num_frames * step frames, which runs up to a step ahead of that. "whole": evenly over the whole video,
            first and last frame included, whatever the step and the start.
        short: what happens to a video shorter than the clip: "refuse", or "hold", which repeats its last frame.
    """

    frame_step: int | None = None
    fps: int | None = None
    duration: float | None = None
    spread: str = "even"
    short: str = "refuse"

    def __post_init__(self) -> None:
        options = {"frame_step": self.frame_step, "fps": self.fps, "duration": self.duration}
        given = [f"{name} {value}" for name, value in options.items() if value is not None]
        if len(given) > 1:
            raise DataError(f"frame sampling: give one of frame_step, fps and duration, not {' and '.join(given)}")
        if any(value is not None and value <= 0 for value in options.values()):
            raise DataError(f"frame sampling: {given[0]} must be positive")

    def step(self, video_fps: float, num_frames: int) -> int:
        rate = math.ceil(video_fps - 1e-9)
        if self.fps is not None:
            return max(1, rate // self.fps)
        if self.duration is not None:
            return max(1, int(self.duration * rate / num_frames))
        return self.frame_step or 1

    def indices(
        self,
        path: str,
        total: int,
        video_fps: float,
        num_frames: int,
        start: str | int,
        generator: np.random.Generator | None,
    ) -> np.ndarray:
        """Frame numbers int64 ``[num_frames]``, ascending. DataError if the video is too short."""
        if self.spread == "whole" and total > 0:
            return np.linspace(0, total - 1, num_frames).astype(np.int64)
        step = self.step(video_fps, num_frames)
        if self.short == "hold" and 0 < total < (num_frames - 1) * step + 1:
            return np.minimum(step * np.arange(num_frames, dtype=np.int64), total - 1)
        span = num_frames * step if self.spread == "published" else (num_frames - 1) * step + 1
        room = total - span
        if room < 0:
            raise DataError(
                f"{path}: has {total} frames, a clip of {num_frames} frames at step {step} needs {span}; "
                "ask for fewer frames or a smaller step, or leave the video out"
            )
        if start == "random":
            generator = generator if generator is not None else np.random.default_rng()
            first = int(generator.integers(room + 1))
        elif start == "center":
            first = room // 2
        elif isinstance(start, float) and 0.0 <= start <= 1.0:
            first = int(room * start)
        elif isinstance(start, numbers.Integral) and 0 <= start <= room:
            first = int(start)
        else:
            raise DataError(
                f"{path}: start {start!r} must be random, center, a float from 0 to 1 "
                f"or a frame number from 0 to {room}"
            )
        if self.spread == "published":
            return np.clip(np.linspace(first, first + span, num_frames), first, first + span - 1).astype(np.int64)
        return first + step * np.arange(num_frames, dtype=np.int64)


def read_clip(
    path: str | os.PathLike,
    num_frames: int,
    frame_step: int | None = None,
    *,
    fps: int | None = None,
    duration: float | None = None,
    start: str | int = "random",
    size: int | tuple[int, int] | None = None,
    generator: np.random.Generator | None = None,
    sampling: Sampling | None = None,
) -> np.ndarray:
    """Read one clip of a video.

    Args:
        num_frames: frames of the clip.
        frame_step, fps, duration: at most one of them, see ``Sampling``; ``sampling`` replaces all three.
        start: "random" (uniform over all that fit, from ``generator``), "center", the first frame's number, or a
            float from 0.0 (the video's beginning) to 1.0 (the clip ends with the video).
        size: (height, width) to scale to (bilinear); one number for a square. None: the video's own.

    Returns:
        uint8 ``[F, H, W, 3]``, RGB.

    Raises:
        DataError: a missing, empty, truncated, audio-only or too short file, or one that is no video.
    """
    path = os.fspath(path)
    sampling = sampling or Sampling(frame_step, fps, duration)
    with _open(path) as video:
        size = (size, size) if isinstance(size, int) else size
        wanted = sampling.indices(path, video.total, video.rate, num_frames, start, generator)
        try:
            return _read(video, wanted, size)
        except DataError:
            if not _recount(video):
                raise
        return _read(video, sampling.indices(path, video.total, video.rate, num_frames, start, generator), size)


@dataclass(frozen=True)
class WholeVideo:
    """A decoded video, from which ``clip`` takes the same frames as ``read_clip`` does from the file.

    Attributes:
        frames: uint8 ``[F, H, W, 3]``. rate: frames per second. told: number of frames before a recount.
    """

    frames: np.ndarray
    rate: float
    told: int

    def clip(
        self, path: str, num_frames: int, start: str | int, generator: np.random.Generator | None, sampling: Sampling
    ) -> np.ndarray:
        wanted = sampling.indices(path, self.told, self.rate, num_frames, start, generator)
        if wanted[-1] >= len(self.frames):
            wanted = sampling.indices(path, len(self.frames), self.rate, num_frames, start, generator)
        return self.frames[wanted]


def read_video(path: str | os.PathLike, max_bytes: int | None = None) -> WholeVideo | None:
    """All frames of a video; None if they would take more than ``max_bytes``. Errors as ``read_clip``."""
    with _open(os.fspath(path)) as video:
        codec, told = video.stream.codec_context, video.total
        if max_bytes is not None and told * codec.height * codec.width * 3 > max_bytes:
            return None
        try:
            frames = _read(video, np.arange(told), None)
        except DataError:
            if not _recount(video):
                raise
            frames = _read(video, np.arange(video.total), None)
        return WholeVideo(frames, video.rate, told)


def probe_video(path: str | os.PathLike) -> dict:
    """``{"frames", "fps", "height", "width", "codec"}`` from the header, without decoding."""
    with _open(os.fspath(path)) as video:
        codec = video.stream.codec_context
        return {
            "frames": video.total,
            "fps": video.rate,
            "height": codec.height,
            "width": codec.width,
            "codec": codec.name,
        }


def read_image(path: str | os.PathLike) -> np.ndarray:
    """Read an image as uint8 ``[H, W, 3]``, RGB. DataError if it is missing, damaged or no image."""
    from PIL import Image, UnidentifiedImageError

    path = os.fspath(path)
    _check_file(path)
    try:
        with Image.open(path) as image:
            return np.array(image.convert("RGB"))
    except UnidentifiedImageError:
        kind = "is a video, an image is meant here" if _suffix(path) in VIDEO_SUFFIXES else "is not a readable image"
        raise DataError(f"{path}: {kind}") from None
    except Exception as error:  # Pillow's decoders raise all sorts on damaged data
        raise DataError(f"{path}: damaged image ({_one_line(error)})") from None


@dataclass
class _Video:
    path: str
    container: object
    stream: object
    total: int
    rate: float
    told: bool  # the header tells the number of frames; otherwise it is worked out from the duration


def _suffix(path: str) -> str:
    return os.path.splitext(path)[1].lower()


def _one_line(error: BaseException) -> str:
    return " ".join(str(getattr(error, "strerror", None) or error).split())


def _check_file(path: str) -> None:
    try:
        if os.path.isdir(path):
            raise DataError(f"{path}: is a folder, not a file")
        if os.stat(path).st_size == 0:
            raise DataError(f"{path}: the file is empty (0 bytes)")
    except OSError as error:
        raise DataError(f"{path}: {_one_line(error)}") from None


@contextmanager
def _open(path: str) -> Iterator[_Video]:
    import av
    from av.stream import Disposition

    _check_file(path)
    if _suffix(path) in IMAGE_SUFFIXES:
        raise DataError(f"{path}: is an image, a video is meant here; images go in a manifest of their own")
    try:
        with av.open(path, metadata_errors="ignore") as container:
            streams = [s for s in container.streams.video if not s.disposition.value & Disposition.attached_pic.value]
            if not streams:  # a cover picture is no film
                kind = "has sound but no video" if container.streams.audio else "has no video stream"
                raise DataError(f"{path}: {kind}")
            if container.format.name == "image2" or container.format.name.endswith("_pipe"):
                raise DataError(f"{path}: is an image, a video is meant here; images go in a manifest of their own")
            stream = streams[0]
            if stream.codec_context is None:
                raise DataError(f"{path}: its codec is not known to this FFmpeg; convert it, for example to H.264")
            stream.thread_type, stream.codec_context.thread_count = "NONE", 1
            rate = stream.average_rate or stream.guessed_rate or stream.base_rate
            if not rate or not stream.time_base:
                raise DataError(f"{path}: the header tells no frame rate; convert it, for example to .mp4")
            yield _Video(path, container, stream, _count(container, stream, rate), float(rate), bool(stream.frames))
    except av.FFmpegError as error:
        raise DataError(f"{path}: unreadable or truncated video ({_one_line(error)})") from None


def _count(container, stream, rate) -> int:
    """Number of frames: the header's, or from the duration, or by reading every packet."""
    if stream.frames:
        return stream.frames
    if stream.duration:
        return round(stream.duration * stream.time_base * rate)
    if container.duration:
        return round(container.duration / 1_000_000 * rate)
    return _packets(container, stream)


def _packets(container, stream) -> int:
    container.seek(0)
    number = sum(1 for packet in container.demux(stream) if packet.size)
    container.seek(0)
    return number


def _recount(video: _Video) -> bool:
    """Whether the number of frames was an estimate (sound may last longer than the picture) and was too high."""
    if video.told:
        return False
    before, video.total = video.total, _packets(video.container, video.stream)
    return video.total < before


def _read(video: _Video, wanted: np.ndarray, size: tuple[int, int] | None) -> np.ndarray:
    clip = _decode(video, wanted, size, seek=wanted[0] > 0)
    if clip is None:  # the seek landed behind the first wanted frame
        clip = _decode(video, wanted, size, seek=True, origin=True)
    return clip


def _decode(
    video: _Video, wanted: np.ndarray, size: tuple[int, int] | None, seek: bool, origin: bool = False
) -> np.ndarray | None:
    from av.video.reformatter import VideoReformatter

    stream, num = video.stream, len(wanted)
    ticks = float(1 / (video.rate * stream.time_base))  # per frame
    offset = stream.start_time or 0
    if seek:
        target = 0 if origin else int(wanted[0] * ticks)
        video.container.seek(offset + target, stream=stream, backward=True, any_frame=False)
    form = {"format": "rgb24", "threads": 1}
    if size is not None:
        form.update(height=size[0], width=size[1], interpolation="BILINEAR")
    reformatter, intra = VideoReformatter(), stream.codec_context.name in _INTRA
    clip, done, index, frame, first = None, 0, -1, None, True
    for packet in video.container.demux(stream):
        if intra and packet.pts is not None and round((packet.pts - offset) / ticks) < wanted[done]:
            continue
        for frame in packet.decode():
            index = index + 1 if frame.pts is None else round((frame.pts - offset) / ticks)
            if first and seek and not origin and not intra and index > wanted[0]:
                return None
            first = False
            if index < wanted[done]:
                continue
            rgb = reformatter.reformat(frame, **form).to_ndarray()
            if clip is None:
                clip = np.empty((num, *rgb.shape), np.uint8)
            elif rgb.shape != clip.shape[1:]:
                raise DataError(f"{video.path}: the picture changes its size at frame {index}; convert the video")
            while done < num and wanted[done] <= index:  # a gap between time stamps is filled with the next frame
                clip[done] = rgb
                done += 1
            if done == num:
                return clip
    # a last frame may be shown for longer than one frame's time
    if frame is not None and clip is not None and frame.duration:
        reach = index + round(frame.duration / ticks) - 1
        while done < num and wanted[done] <= reach:
            clip[done] = clip[done - 1]
            done += 1
        if done == num:
            return clip
    raise DataError(
        f"{video.path}: truncated or damaged video, frame {int(wanted[done])} of {video.total} could not be decoded"
    )


__all__ = ["Sampling", "is_image_path", "probe_video", "read_clip", "read_image", "read_video"]
