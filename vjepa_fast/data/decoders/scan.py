"""Making a frame index: the packets are read once; where they leave doubt about what is shown, they are decoded too."""

from __future__ import annotations

import zlib
from array import array
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from vjepa_fast.data.decoders.ffmpeg import Film, SeekError, open_film
from vjepa_fast.data.decoders.index import FROM_START, FrameIndex, even_out, rate_of
from vjepa_fast.data.decoders.picture import turn_of
from vjepa_fast.data.media import ReadOptions
from vjepa_fast.data.members import stat_of
from vjepa_fast.errors import DataError

if TYPE_CHECKING:
    from av.video.frame import VideoFrame

# Codecs of which every packet, but for those named in `_Packets.doubt`, shows one frame, in the order of time stamps.
_ONE_EACH = frozenset({
    "h264", "hevc", "vp8", "vp9", "av1", "mpeg1video", "mpeg2video", "mpeg4", "h263", "flv1", "flv", "theora",
    "wmv1", "wmv2", "msmpeg4v2", "msmpeg4", "mjpeg", "png", "ffv1", "huffyuv", "ffvhuff", "utvideo", "magicyuv",
    "prores", "dnxhd", "dvvideo", "rawvideo", "jpeg2000", "cfhd", "v210", "libdav1d", "libvpx", "libvpx-vp9",
})  # fmt: skip
# Codecs that draw each picture on the last one, whatever their packets are marked as.
_CUMULATIVE = frozenset({"gif", "apng", "webp", "awebp", "webp_anim", "flic", "msrle", "qtrle"})
_TIMED = ("mov", "matroska", "mpegts", "mpeg", "flv", "nut")  # containers that hold the times at which frames are shown
_NO_TIME = np.iinfo(np.int64).min
_HIDES = frozenset({"vp9", "av1", "theora"})  # of these codecs a packet that shows nothing is nothing unusual
_STUB = 9  # bytes; a smaller packet may say "as before", and show nothing
_STUB_MPEG4 = 20
_MANY = 0.25  # share of packets without a frame from which on they are the way of the file, not damage
_LONGEST_STEP = 10.0  # seconds from frame to frame in a broadcast stream; more is where two were joined


class _Packets:
    """Columns of all packets of a stream, and the first frame shown.

    Attributes:
        pts, dts: int64, `_NO_TIME` where missing. pos, size: int64. key: numbers of the key packets. key_crc: theirs.
        shown: numbers of the packets that show a frame, as far as packets tell. first: (packet, frame) shown first.
        stub: bytes below which a packet may show nothing.
        made_up: the container does not say when frames are shown, and FFmpeg's guess is wrong with B-frames.
        lost: packets that the container lists and does not hold.
    """

    def __init__(self, film: Film) -> None:
        hides = film.codec == "vp8"
        reorders = film.stream.codec_context.codec.reorder
        self.stub = _STUB_MPEG4 if film.codec == "mpeg4" else _STUB
        self.made_up = reorders and film.container.format.name.split(",")[0] not in _TIMED
        pts, dts, pos, size = array("q"), array("q"), array("q"), array("q")
        key, key_crc, shown = array("q"), array("Q"), array("b")
        self.first: tuple[int, VideoFrame] | None = None
        for number, packet in film.from_start():
            if packet is not None:
                pts.append(_NO_TIME if packet.pts is None else packet.pts)
                dts.append(_NO_TIME if packet.dts is None else packet.dts)
                pos.append(-1 if packet.pos is None else packet.pos)
                size.append(packet.size)
                shown.append(not (packet.is_discard or (hides and not memoryview(packet)[0] & 0x10)))
                if packet.is_keyframe:
                    key.append(number)
                    key_crc.append(zlib.crc32(packet))
            if self.first is None:
                self.first = next(film.decode([(number, packet)]), None)
        if self.first is None:
            raise DataError(f"{film.path}: truncated or damaged video, no frame can be decoded")
        self.pts, self.dts, self.pos, self.size = map(np.array, (pts, dts, pos, size))
        self.key, self.key_crc = np.array(key, np.int32), np.array(key_crc, np.uint32)
        self.shown = np.nonzero(np.array(shown))[0].astype(np.int32)
        self.lost = 0
        listed = film.stream.index_entries
        if film.container.format.name.startswith("mov") and len(listed) > len(pts):
            if len(listed) > (size_of := max(1, stat_of(film.path)[0])):
                raise DataError(f"{film.path}: damaged video, lists {len(listed)} frames in {size_of} bytes")
            self.lost = max(0, sum(entry.size > 0 for entry in listed) - len(pts))

    def order(self) -> np.ndarray:
        """The packets that show a frame, in the order of their time stamps."""
        return self.shown[np.argsort(self.pts[self.shown], kind="stable")]

    def doubt(self, film: Film) -> bool:
        """Whether the packets alone leave it open which frames are shown, and in which order."""
        assert self.first is not None, "the constructor has raised"
        pts, dts = self.pts[self.shown], self.dts[self.dts != _NO_TIME]
        return (
            film.codec not in _ONE_EACH
            or self.made_up
            or not len(pts)
            or not len(self.key)
            or self.key[0] != 0
            or bool((pts == _NO_TIME).any())
            or len(np.unique(pts)) < len(pts)
            or bool((pts < self.pts[0]).any())  # refers to what came before the first key frame
            or bool((np.diff(dts) < 0).any())
            or int(self.size.min()) < self.stub
            or self.order()[0] != self.first[0]
        )

    def gaps(self, codec: str, order: np.ndarray) -> np.ndarray:
        """Packets that should show a frame, and did not in a decode that gave ``order``.

        What comes before the second frame shown is left out: pictures that refer to what was before the file's start.
        """
        if codec not in _ONE_EACH - _HIDES or len(order) < 2:
            return np.zeros(0, np.int32)
        due = self.shown[(self.size[self.shown] >= self.stub) & (self.shown > order[1:].min())]
        gaps = np.setdiff1d(due, order)
        return gaps if len(gaps) <= _MANY * len(due) else gaps[:0]

    def times(self, order: np.ndarray) -> np.ndarray | None:
        """When the frames of ``order`` are shown; None where the file does not say."""
        pts, dts = self.pts[order], np.sort(self.dts[order])
        for stamps in (dts,) if self.made_up else (pts, dts):
            if not (stamps == _NO_TIME).any() and (len(order) == 1 or stamps[0] != stamps[-1]):
                return stamps
        return None


def scan(path: str, options: ReadOptions, decode: bool = False) -> FrameIndex:
    """The frame index of a file.

    Args:
        path: of the video.
        options: its limits apply.
        decode: decode all frames even where the packets leave no doubt.

    Raises:
        DataError: as `open_film`; or no frame can be decoded.
    """
    lenient = replace(options, corrupt="keep")  # whether damage matters is decided when frames are read
    with open_film(path, lenient) as film:
        packets = _Packets(film)
        if not decode and not packets.doubt(film):
            return _index(film, packets, packets.order(), damaged=False)
    with open_film(path, lenient) as film:
        film.stream.codec_context.options |= {"skip_loop_filter": "all", "skip_idct": "all"}  # pictures do not matter
        order, damaged = array("i"), False
        for number, frame in film.decode(film.from_start()):
            damaged |= frame.is_corrupt
            if number >= 0:
                order.append(number)
        if not order:
            raise DataError(f"{path}: truncated or damaged video, no frame can be decoded")
        return _index(film, packets, np.array(order, np.int32), damaged or film.errors > 0)


def _index(film: Film, packets: _Packets, order: np.ndarray, damaged: bool) -> FrameIndex:
    assert packets.first is not None, "its constructor has raised"
    stream, frame = film.stream, packets.first[1]
    rates = (stream.average_rate, stream.guessed_rate, stream.base_rate)
    announced = [float(rate) for rate in rates if rate]
    time_base, pts = float(stream.time_base or 1), packets.times(order)
    if pts is None:
        time_base, pts = 1 / (announced[0] if announced else 25.0), np.arange(len(order))
    broadcast = film.container.format.name in ("mpegts", "mpeg")
    pts = even_out(pts, _LONGEST_STEP / time_base if broadcast else np.inf)
    rate, constant = rate_of(pts, time_base, announced)
    aspect = float(stream.sample_aspect_ratio or 1)
    stamps = np.where(packets.pts == _NO_TIME, packets.dts, packets.pts)
    drawn_on = film.codec in _CUMULATIVE or stream.codec_context.pix_fmt == "pal8"
    index = FrameIndex(
        order=order,
        pts=pts,
        time_base=time_base,
        rate=rate,
        constant=constant,
        packets=len(packets.pts),
        key=packets.key,
        key_ts=stamps[packets.key],
        key_pos=packets.pos[packets.key],
        key_size=packets.size[packets.key].astype(np.int32),
        key_crc=packets.key_crc,
        gaps=packets.gaps(film.codec, order),
        seek="none" if drawn_on else "time",
        independent=not drawn_on and len(packets.key) == len(packets.pts),
        lost=packets.lost,
        damaged=damaged,
        turn=turn_of(frame),
        aspect=aspect if abs(aspect - 1) > 0.01 and 0.2 < aspect < 5 else 1.0,
        interlaced=bool(frame.interlaced_frame),
        width=frame.width,
        height=frame.height,
        codec=stream.codec_context.name,
    )
    return index if drawn_on else replace(index, seek=_way(film, index))


def _way(film: Film, index: FrameIndex) -> str:
    """How a key packet in the middle of the file is found, as ``FrameIndex.seek``."""
    row = index.seek_point(index.frames // 2)
    for way in ("time", "bytes") if row != FROM_START else ():
        try:
            next(film.from_key(replace(index, seek=way), row))
        except SeekError:
            continue
        return way
    return "time" if row == FROM_START else "none"
