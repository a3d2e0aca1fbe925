"""Files through PyAV: opening them, the stream that is the film, its packets by number, and decoding one after another.

Packets go to the decoder with their numbers in place of time stamps, so every frame says which packet it came from,
whatever the file's own time stamps are worth.
"""

from __future__ import annotations

import errno
import functools
import io
import time
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from itertools import islice
from typing import TYPE_CHECKING

from vjepa_fast.data.decoders.index import FROM_START, FrameIndex
from vjepa_fast.data.media import ReadOptions, check_file, is_image_path, one_line
from vjepa_fast.data.members import ffmpeg_name, is_url, member_of, read_bytes
from vjepa_fast.errors import DataError

if TYPE_CHECKING:
    from av.container import InputContainer
    from av.packet import Packet
    from av.video.frame import VideoFrame
    from av.video.stream import VideoStream

# Formats of files that name other files, addresses or devices: with one, a list of videos would reach further.
_ELSEWHERE = frozenset({
    "concat", "concatf", "hls", "dash", "webm_dash_manifest", "imf", "image2", "vobsub", "sdp", "rtsp", "rtp", "sap",
    "lavfi", "libcdio", "tty", "alsa", "oss", "pulse", "jack", "sndio", "fbdev", "kmsgrab", "x11grab", "xcbgrab",
    "v4l2", "video4linux2", "dshow", "vfwcap", "gdigrab", "avfoundation", "decklink", "iec61883", "openal", "bktr",
    "android_camera",
})  # fmt: skip
END = (-1, None)  # in place of (number, packet): no more come
_SEARCH = 64  # packets read after a seek in search of a key packet that the index knows


class SeekError(Exception):
    """The file cannot be entered where the index says."""


class Film:
    """An open file and its video stream.

    Attributes:
        path, container, stream, options: as opened.
        codec: FFmpeg's name of the format. errors: packets met that cannot be decoded.
    """

    def __init__(self, path: str, container: InputContainer, stream: VideoStream, options: ReadOptions) -> None:
        from av.stream import Discard

        codec = stream.codec_context
        if codec is None:
            raise DataError(f"{path}: its codec is not known to this FFmpeg; convert it, for example to H.264")
        if not stream.time_base:
            raise DataError(f"{path}: the header gives no clock; convert it, for example to .mp4")
        options.check_size(path, codec.width, codec.height)
        self.path, self.container, self.stream, self.options = path, container, stream, options
        stream.thread_type, codec.thread_count = "NONE", 1  # and frames of frame threads are not marked as damaged
        self.codec = codec.codec.canonical_name
        settings = {"max_pixels": str(options.max_pixels)}
        if self.codec == "mjpeg":  # its decoder paints over what it cannot read without marking the frame
            settings["err_detect"] = "crccheck+explode"
        codec.options = settings
        for other in container.streams:
            if other is not stream:
                other.discard = Discard.all
        self.errors = 0
        self._end = time.monotonic() + options.max_seconds

    def packets(self) -> Iterator[Packet]:
        """The packets of the stream from where the file stands, without empty ones.

        Raises:
            DataError: it takes longer than ``data.max_seconds``.
        """
        for packet in self._demux():
            if time.monotonic() > self._end:
                raise _slow(self.path, self.options)
            if packet.size:
                yield packet

    def _demux(self) -> Iterator[Packet]:
        with suppress(IndexError):  # at the end of a file in which a stream turned up late, PyAV counts one too many
            yield from self.container.demux(self.stream)

    def decode(self, numbered: Iterable[tuple[int, Packet | None]]) -> Iterator[tuple[int, VideoFrame]]:
        """(packet number, frame) of each frame that comes out as these packets go in, in the order shown.

        A packet of None makes the decoder give out all that it has left. ``errors`` counts what cannot be decoded.

        Raises:
            DataError: a packet cannot be decoded, and ``options.corrupt`` is "refuse".
        """
        from av.error import EOFError as EndOfFile
        from av.error import FFmpegError

        decode = self.stream.codec_context.decode
        for number, packet in numbered:
            if packet is not None:
                packet.pts = number
            try:
                frames = decode(packet)
            except EndOfFile:
                continue
            except FFmpegError as error:
                self.errors += 1
                if self.options.corrupt == "refuse":
                    raise DataError(f"{self.path}: damaged video, packet {number}: {one_line(error)}") from None
                continue
            for frame in frames:
                yield (-1 if frame.pts is None else frame.pts), frame

    def from_start(self) -> Iterator[tuple[int, Packet | None]]:
        """(number, packet) of all packets, and (-1, None) at the end; the file must be freshly opened."""
        yield from enumerate(self.packets())
        yield END

    def from_key(self, index: FrameIndex, row: int) -> Iterator[tuple[int, Packet | None]]:
        """(number, packet) from the key packet of that row on, or from the start of a freshly opened file; last `END`.

        Raises:
            SeekError: the place cannot be found; the file must be opened again.
        """
        if row == FROM_START:
            yield from self.from_start()
            return
        self._seek(index, row)
        wanted, packets = int(index.key[row]), self.packets()
        number, packet = _landing(index, packets)
        while number < wanted and packet is not None:
            number, packet = number + 1, next(packets, None)
        if number != wanted or packet is None or zlib.crc32(packet) != index.key_crc[row]:
            raise SeekError
        yield number, packet
        yield from enumerate(packets, wanted + 1)
        yield END

    def _seek(self, index: FrameIndex, row: int) -> None:
        from av.error import FFmpegError

        try:
            if index.seek == "bytes":
                self.container.seek(int(index.key_pos[row]), stream=self.stream, unsupported_byte_offset=True)
            else:
                self.container.seek(int(index.key_ts[row]), stream=self.stream)
        except FFmpegError:
            raise SeekError from None


def _landing(index: FrameIndex, packets: Iterator[Packet]) -> tuple[int, Packet | None]:
    """The next key packet that the index knows, and its number. SeekError if none comes soon."""
    for packet in islice(packets, _SEARCH):
        if packet.is_keyframe and (number := _known(index, packet)) >= 0:
            return number, packet
    raise SeekError


def _known(index: FrameIndex, packet: Packet) -> int:
    """The number of a key packet by its content, and by its time stamp where others have the same; -1 if unknown."""
    rows = (index.key_size == packet.size).nonzero()[0]
    if len(rows):
        rows = rows[index.key_crc[rows] == zlib.crc32(packet)]
    if len(rows) > 1:
        rows = rows[index.key_ts[rows] == stamp_of(packet)]
    return int(index.key[rows[0]]) if len(rows) == 1 else -1


def stamp_of(packet: Packet) -> int:
    """A packet's time stamp: when it is shown, or else when it is decoded; 0 without either."""
    return next((stamp for stamp in (packet.pts, packet.dts) if stamp is not None), 0)


@contextmanager
def open_film(path: str, options: ReadOptions) -> Iterator[Film]:
    """Open a video for the ``with`` block.

    Raises:
        DataError: the file is missing, empty, damaged or no video, or its frames are larger than allowed.
    """
    import av
    from av.error import ExitError, FFmpegError

    check_file(path)
    if is_image_path(path):
        raise _image(path)
    try:
        with av.open(
            _opened(path), options=_settings(), metadata_errors="ignore", timeout=min(options.max_seconds, 1e6)
        ) as container:
            stream = _best(path, container)
            yield Film(path, container, stream, options)
    except MemoryError:
        raise DataError(f"{path}: no memory for its frames; scale it down, or lower data.max_clip_mb") from None
    except ExitError:
        raise _slow(path, options) from None
    except FFmpegError as error:
        why = "of a kind that names other files, or damaged" if error.errno == errno.EINVAL else one_line(error)
        raise DataError(f"{path}: unreadable or truncated video ({why})") from None


@functools.cache
def _settings() -> dict[str, str]:
    """Settings by which FFmpeg opens nothing but the file itself."""
    import av

    names = {part for name in av.formats_available for part in name.split(",")} - _ELSEWHERE
    return {"format_whitelist": ",".join(sorted(names)), "protocol_whitelist": "file,subfile"}


def _opened(path: str) -> str | io.BytesIO:
    """What FFmpeg opens for a path: what lies behind a URL is fetched."""
    member = member_of(path)
    if member is None or not is_url(member.shard):
        return ffmpeg_name(path)
    try:
        return io.BytesIO(read_bytes(path))
    except OSError as error:
        raise DataError(f"{path}: {one_line(error)}") from None


def _slow(path: str, options: ReadOptions) -> DataError:
    return DataError(
        f"{path}: reading takes longer than data.max_seconds {options.max_seconds:g}; "
        "convert the video, or raise the limit"
    )


def _image(path: str) -> DataError:
    return DataError(f"{path}: is an image, a video is meant here; images go in a manifest of their own")


def _best(path: str, container: InputContainer) -> VideoStream:
    """The film among the video streams: no cover, thumbnail, still or preview; of several, the one FFmpeg plays."""
    from av.stream import Disposition

    aside = Disposition.attached_pic | Disposition.timed_thumbnails | Disposition.still_image
    films = [s for s in container.streams.video if not int(s.disposition) & int(aside)]
    if not films:
        raise DataError(f"{path}: has {'sound but no video' if container.streams.audio else 'no video stream'}")
    if container.format.name == "image2" or container.format.name.endswith("_pipe"):
        raise _image(path)
    if len(films) == 1:
        return films[0]
    lasting = {s.index: float((s.duration or 0) * (s.time_base or 0)) for s in films}
    many = max(s.frames for s in films) > 1
    films = [
        s for s in films if 2 * lasting[s.index] >= max(lasting.values()) and not (many and s.frames == 1)
    ] or films
    best = container.streams.best("video")
    return next((s for s in films if best is not None and s.index == best.index), films[0])
