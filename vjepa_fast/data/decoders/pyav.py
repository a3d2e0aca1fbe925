"""Reading frames of video files with PyAV (the wheel brings FFmpeg), on the CPU.

One decoding thread per call: call it from several threads instead, PyAV releases the interpreter lock. Frame counts
and rates come from the container's header.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np

from vjepa_fast.data.decoders.api import DECODERS, Decoder, Video, VideoInfo
from vjepa_fast.data.media import check_file, is_image_path, one_line
from vjepa_fast.errors import DataError

if TYPE_CHECKING:
    from fractions import Fraction

    from av.container import InputContainer
    from av.video.stream import VideoStream

# codecs without prediction between frames: unwanted packets need no decoding
_INTRA = frozenset({"mjpeg", "png", "ffv1", "prores", "rawvideo", "dnxhd", "huffyuv"})


@DECODERS.register("pyav")
class PyAV(Decoder):
    """FFmpeg through PyAV: every container and codec that its wheel reads."""

    @classmethod
    def objections(cls) -> list[str]:
        """PyAV is not installed, or nothing."""
        return [] if importlib.util.find_spec("av") else ["PyAV is not installed (pip install av)"]

    @contextmanager
    def open(self, path: str) -> Iterator[Video]:
        """As ``Decoder.open``; the first video stream that is no cover picture."""
        import av
        from av.error import FFmpegError
        from av.stream import Disposition

        check_file(path)
        if is_image_path(path):
            raise DataError(f"{path}: is an image, a video is meant here; images go in a manifest of their own")
        try:
            with av.open(path, metadata_errors="ignore") as container:
                streams = [
                    s for s in container.streams.video if not s.disposition.value & Disposition.attached_pic.value
                ]
                if not streams:
                    kind = "has sound but no video" if container.streams.audio else "has no video stream"
                    raise DataError(f"{path}: {kind}")
                if container.format.name == "image2" or container.format.name.endswith("_pipe"):
                    raise DataError(f"{path}: is an image, a video is meant here; images go in a manifest of their own")
                yield _Film(path, container, streams[0])
        except FFmpegError as error:
            raise DataError(f"{path}: unreadable or truncated video ({one_line(error)})") from None


class _Film(Video):
    def __init__(self, path: str, container: InputContainer, stream: VideoStream) -> None:
        if stream.codec_context is None:
            raise DataError(f"{path}: its codec is not known to this FFmpeg; convert it, for example to H.264")
        stream.thread_type, stream.codec_context.thread_count = "NONE", 1
        rate = stream.average_rate or stream.guessed_rate or stream.base_rate
        if not rate or not stream.time_base:
            raise DataError(f"{path}: the header gives no frame rate; convert it, for example to .mp4")
        self.container, self.stream = container, stream
        codec = stream.codec_context
        info = VideoInfo(
            frames=self._count(rate), fps=float(rate), height=codec.height, width=codec.width, codec=codec.name
        )
        super().__init__(path, info)
        self.ticks = float(1 / (info["fps"] * stream.time_base))  # of the stream's clock, per frame
        self.offset = stream.start_time or 0

    def _count(self, rate: Fraction) -> int:
        """Number of frames: the header's, or from the duration, or by reading every packet."""
        stream = self.stream
        if stream.frames:
            return stream.frames
        if stream.duration and stream.time_base:
            return round(stream.duration * stream.time_base * rate)
        if self.container.duration:
            return round(self.container.duration / 1_000_000 * rate)
        return self._packets()

    def _packets(self) -> int:
        self.container.seek(0)
        number = sum(1 for packet in self.container.demux(self.stream) if packet.size)
        self.container.seek(0)
        return number

    def recount(self) -> bool:
        """Sound may last longer than the picture: then the duration gives too many frames."""
        if self.stream.frames:  # the header has the number itself
            return False
        before, self.info["frames"] = self.info["frames"], self._packets()
        return self.info["frames"] < before

    def read(self, numbers: np.ndarray, size: tuple[int, int] | None) -> np.ndarray:
        clip = self._decode(numbers, size, seek_to=int(numbers[0] * self.ticks) if numbers[0] > 0 else None)
        if clip is None:  # the seek landed behind the first wanted frame
            clip = self._decode(numbers, size, seek_to=0)
        assert clip is not None, "decoding from the start cannot land behind"
        return clip

    def _decode(self, wanted: np.ndarray, size: tuple[int, int] | None, seek_to: int | None) -> np.ndarray | None:
        """``seek_to``: ticks from the start, or None. Returns None if the seek landed behind the first wanted frame."""
        from av.video.reformatter import VideoReformatter

        num, ticks, offset = len(wanted), self.ticks, self.offset
        if seek_to is not None:
            self.container.seek(offset + seek_to, stream=self.stream, backward=True, any_frame=False)
        form: dict[str, Any] = {"format": "rgb24", "threads": 1}
        if size is not None:
            form.update(height=size[0], width=size[1], interpolation="BILINEAR")
        reformatter, intra = VideoReformatter(), self.info["codec"] in _INTRA
        clip, done, index, frame, first = None, 0, -1, None, True
        for packet in self.container.demux(self.stream):
            if intra and packet.pts is not None and round((packet.pts - offset) / ticks) < wanted[done]:
                continue
            for frame in packet.decode():
                index = index + 1 if frame.pts is None else round((frame.pts - offset) / ticks)
                if first and seek_to and not intra and index > wanted[0]:
                    return None
                first = False
                if index < wanted[done]:
                    continue
                rgb = reformatter.reformat(frame, **form).to_ndarray()
                if clip is None:
                    clip = np.empty((num, *rgb.shape), np.uint8)
                elif rgb.shape != clip.shape[1:]:
                    raise DataError(f"{self.path}: the picture changes its size at frame {index}; convert the video")
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
            f"{self.path}: truncated or damaged video, frame {int(wanted[done])} of {self.info['frames']} "
            "could not be decoded"
        )
