"""Small films of every kind that people have, each frame showing its number, for tests and ``frame_starts.py``.

``KINDS`` maps a kind to a function that writes its film into a folder and returns the path. A kind whose encoder this
FFmpeg lacks raises `Lacking`.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterable
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
from av.codec.codec import UnknownCodecError
from av.error import EncoderNotFoundError
from av.stream import Disposition

FRAMES = 30
SIDE = 16  # of the squares that show a number, 4 in a row, 8 bits
SIZE = (64, 48)

STUB = b"\x00\x00\x01\xb6\x50\x4f\x7f"  # of MPEG-4 at 25 frames per second: the picture is as before

KINDS: dict[str, Callable[[Path], Path]] = {}


class Lacking(Exception):
    """An encoder or container that this FFmpeg does not have."""


def paint(number: int, size: tuple[int, int] = SIZE) -> np.ndarray:
    """A picture of a number, uint8 ``[H, W, 3]``; the rest moves, so that frames refer to one another."""
    width, height = size
    x, y = np.arange(width), np.arange(height)[:, None]
    picture = np.repeat((110 + 30 * np.sin((x + 3 * number) / 7) * np.sin(y / 5))[..., None], 3, 2).astype(np.uint8)
    for bit in range(8):
        row, column = divmod(bit, 4)
        level = 235 if number >> bit & 1 else 16
        picture[row * SIDE : (row + 1) * SIDE, column * SIDE : (column + 1) * SIDE] = level
    return picture


def number_of(picture: np.ndarray) -> int:
    """The number that a picture of `paint` shows."""
    at = [divmod(bit, 4) for bit in range(8)]
    return sum(
        int(picture[r * SIDE + 4 : r * SIDE + 12, c * SIDE + 4 : c * SIDE + 12].mean() > 125) << bit
        for bit, (r, c) in enumerate(at)
    )


def plain_decode(path: Path | str) -> list[np.ndarray]:
    """What a decode of the whole file shows, RGB, upright and with square pixels; of several streams the longest."""
    with av.open(str(path)) as film:
        stream = max(film.streams.video, key=lambda s: s.frames)
        stream.codec_context.thread_count, stream.thread_type = 1, "NONE"
        frames = [f for packet in film.demux(stream) if packet.size for f in packet.decode()] + stream.decode(None)
        width = round(frames[0].width * (stream.sample_aspect_ratio or 1))
        form = {} if width == frames[0].width else {"width": width, "interpolation": "BILINEAR"}
        return [np.rot90(f.to_ndarray(format="rgb24", **form), f.rotation // 90) for f in frames]


def encode(
    path: Path,
    codec: str,
    options: dict[str, str] | None = None,
    *,
    numbers: Iterable[int] = range(FRAMES),
    fps: int = 25,
    fmt: str = "yuv420p",
    size: tuple[int, int] = SIZE,
    times: list[int] | None = None,
    base: Fraction | None = None,
    container: dict[str, str] | None = None,
    form: str | None = None,
    change: Callable[[Any], None] | None = None,
    sound: bool = False,
) -> Path:
    """Write a film of these numbers; ``change`` is called with the stream before the first frame."""
    try:
        with av.open(str(path), "w", format=form, options=container or {}) as out:
            stream = out.add_stream(codec, rate=fps)
            stream.width, stream.height, stream.pix_fmt, stream.options = *size, fmt, options or {}
            if base is not None:
                stream.codec_context.time_base = base
            if change is not None:
                change(stream)
            voices = [out.add_stream("aac", rate=16000, layout="mono")] if sound else []
            for i, number in enumerate(numbers):
                frame = _frame(paint(number, size), fmt)
                if times is not None:
                    frame.pts, frame.time_base = times[i], base
                out.mux(stream.encode(frame))
            out.mux(stream.encode())
            for voice in voices:
                for _ in range(40):
                    silence = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
                    silence.sample_rate = 16000
                    out.mux(voice.encode(silence))
                out.mux(voice.encode())
    except (UnknownCodecError, EncoderNotFoundError) as error:
        raise Lacking(f"{codec}: {error}") from None
    return path


def _frame(picture: np.ndarray, fmt: str) -> av.VideoFrame:
    if fmt != "pal8":
        return av.VideoFrame.from_ndarray(picture, "rgb24")
    grey: Any = (np.ascontiguousarray(picture[..., 0]), np.repeat(np.arange(256, dtype=np.uint8)[:, None], 4, 1))
    return av.VideoFrame.from_ndarray(grey, "pal8")


def remux(source: Path, path: Path, change: Callable[[list[Any]], list[Any]], **options: str) -> Path:
    """Copy the packets of a film, changed, into another file."""
    with av.open(str(source)) as film, av.open(str(path), "w", options=options) as out:
        stream = out.add_stream_from_template(film.streams.video[0])
        for packet in change([p for p in film.demux(video=0) if p.size]):
            packet.stream = stream
            out.mux(packet)
    return path


def kind(name: str, file: str, codec: str, options: dict[str, str] | None = None, **settings: Any) -> None:
    """A kind that is one call of `encode`."""
    KINDS[name] = lambda folder: encode(folder / file, codec, options, **settings)


def made(name: str) -> Callable[[Callable[[Path], Path]], Callable[[Path], Path]]:
    """A kind that takes more than that."""

    def add(make: Callable[[Path], Path]) -> Callable[[Path], Path]:
        KINDS[name] = make
        return make

    return add


B = {"bf": "2", "g": "8", "qmin": "2", "qmax": "5"}
X264 = {"bf": "3", "g": "12", "crf": "18"}
OPEN = {"x264-params": "open-gop=1:keyint=10:bframes=3:b-adapt=0:scenecut=0", "crf": "18"}
REFRESH = {"x264-params": "intra-refresh=1:keyint=10:bframes=0", "crf": "18"}
X265 = "log-level=none:pools=none:frame-threads=1:keyint=10:bframes=3:b-adapt=0:scenecut=0"
ALTREF = {"b": "300k", "auto-alt-ref": "1", "lag-in-frames": "12", "g": "15", "cpu-used": "8"}
SLOW = {"b": "300k", "g": "10", "cpu-used": "8", "lag-in-frames": "0"}
LACED = {**B, "flags": "+ilme+ildct"}

kind("h264 mp4, B-frames", "b.mp4", "libx264", X264)
kind("h264 mp4, open GOP", "open.mp4", "libx264", OPEN)
kind("h264 mp4, intra refresh", "refresh.mp4", "libx264", REFRESH)
kind("h264 mp4, one key frame", "one.mp4", "libx264", {"g": "999", "keyint_min": "999", "bf": "2"})
kind("h264 mp4, every frame a key", "keys.mp4", "libx264", {"g": "1"})
kind("h264 mp4, fragments", "frag.mp4", "libx264", X264, container={"movflags": "frag_keyframe+empty_moov"})
kind("h264 mp4, longer sound", "sound.mp4", "libx264", X264, sound=True)
kind("h264 mov", "b.mov", "libx264", X264)
kind("h264 mkv", "b.mkv", "libx264", X264)
kind("h264 mkv, no index", "live.mkv", "libx264", X264, container={"live": "1"})
kind("h264 mkv, 10 bit 4:4:4", "ten.mkv", "libx264", X264, fmt="yuv444p10le")
kind("h264 mkv, interlaced", "laced.mkv", "libx264", {**X264, "x264-params": "interlaced=1"})
kind("h264 ts", "b.ts", "libx264", X264)
kind("h264 ts, open GOP, sound", "open.ts", "libx264", OPEN, sound=True)
kind("h264 avi, B-frames", "b.avi", "libx264", X264)
kind("h264 flv", "b.flv", "libx264", X264)
kind("h264 stream", "b.h264", "libx264", X264)
kind("hevc mp4, RASL", "rasl.mp4", "libx265", {"x265-params": X265 + ":open-gop=1"})
kind("hevc ts", "b265.ts", "libx265", {"x265-params": X265})
kind("hevc stream", "b.hevc", "libx265", {"x265-params": X265 + ":open-gop=1"})
kind("vp8 webm, hidden frames", "alt.webm", "libvpx", ALTREF)
kind("vp9 webm, hidden frames", "alt9.webm", "libvpx-vp9", ALTREF)
kind("vp9 ivf", "b.ivf", "libvpx-vp9", ALTREF)
kind("vp8 ogv", "b.ogv", "libvpx", SLOW)
kind("av1 mp4", "av1.mp4", "libsvtav1", {"preset": "12", "g": "10", "svtav1-params": "lp=1"}, size=(64, 64))
kind("mpeg4 mp4, B-frames", "b4.mp4", "mpeg4", B)
kind("mpeg4 avi", "p4.avi", "mpeg4", {**B, "bf": "0"})
kind("mpeg4 avi, B-frames", "b4.avi", "mpeg4", B)
kind("msmpeg4 avi", "ms.avi", "msmpeg4", {**B, "bf": "0"})
kind("mpeg1 mpg", "b1.mpg", "mpeg1video", B)
kind("mpeg2 mpg", "b2.mpg", "mpeg2video", B)
kind("mpeg2 vob", "b2.vob", "mpeg2video", B, form="vob")
kind("mpeg2 ts", "b2.ts", "mpeg2video", B)
kind("mpeg2 mxf", "b2.mxf", "mpeg2video", B, size=(64, 48))
kind("mpeg2 stream", "b2.m2v", "mpeg2video", B)
kind("mpeg2 mpg, interlaced", "laced.mpg", "mpeg2video", LACED)
kind("mjpeg avi", "j.avi", "mjpeg", {"qmin": "2", "qmax": "3"}, fmt="yuvj420p")
kind(
    "mjpeg avi, frames repeated", "jj.avi", "mjpeg", {"qmin": "2"}, fmt="yuvj420p", numbers=[i // 3 for i in range(30)]
)
kind("mjpeg stream", "j.mjpeg", "mjpeg", {"qmin": "2", "qmax": "3"}, fmt="yuvj420p")
kind("ffv1 avi, state over frames", "f.avi", "ffv1", {"g": "10", "context": "1", "coder": "1"})
kind("huffyuv avi", "h.avi", "huffyuv", fmt="yuv422p")
kind("raw avi, palette", "pal.avi", "rawvideo", fmt="pal8")
kind("msrle avi, palette", "rle.avi", "msrle", fmt="pal8")
kind("msvideo1 avi", "v1.avi", "msvideo1", fmt="rgb555le")
kind("zmbv avi", "z.avi", "zmbv", {"g": "10"}, fmt="bgr0")
kind("qtrle mov", "q.mov", "qtrle", {"g": "10"}, fmt="rgb24")
kind("cinepak avi", "c.avi", "cinepak", {"g": "10"}, fmt="rgb24", numbers=range(12))
kind("svq1 mov", "s.mov", "svq1", {"g": "10"}, fmt="yuv410p")
kind("utvideo avi", "u.avi", "utvideo", fmt="gbrp")
kind("dnxhd mov", "dn.mov", "dnxhd", {"profile": "dnxhr_sq"}, fmt="yuv422p", size=(256, 128), numbers=range(8))
kind("jpeg2000 mov", "j2.mov", "jpeg2000", fmt="rgb24")
kind("png mov", "p.mov", "png", fmt="rgb24")
kind("prores mov", "pr.mov", "prores_ks", fmt="yuv422p10le")
kind("dv avi", "dv.avi", "dvvideo", size=(720, 576), numbers=range(6))
kind("dv stream", "d.dv", "dvvideo", size=(720, 576), numbers=range(6))
kind("wmv2 wmv", "w.wmv", "wmv2", {**B, "bf": "0"})
kind("flv1 flv", "f.flv", "flv", {**B, "bf": "0"})
kind("h263 3gp", "h.3gp", "h263", {**B, "bf": "0"}, size=(128, 96))
kind("rv20 rm", "r.rm", "rv20", {**B, "bf": "0"}, size=(128, 96))
kind("gif", "g.gif", "gif", fmt="rgb8")
kind("apng", "a.apng", "apng", fmt="rgb24")
kind("yuv4mpeg", "y.y4m", "wrapped_avframe", fmt="yuv420p")
kind("mpeg4 nut, B-frames", "b.nut", "mpeg4", B)


@made("h264 mp4, cut by an edit list")
def _cut(folder: Path) -> Path:
    def later(packets: list[Any]) -> list[Any]:
        shift = round(Fraction(7, 25) / packets[0].time_base)
        for packet in packets:
            packet.pts, packet.dts = packet.pts - shift, packet.dts - shift
        return packets

    return remux(KINDS["h264 mp4, B-frames"](folder), folder / "cut.mp4", later)


@made("h264 mp4, open GOP, begins in the middle")
def _middle(folder: Path) -> Path:
    return remux(KINDS["h264 mp4, open GOP"](folder), folder / "middle.mp4", _from_second_key)


def _from_second_key(packets: list[Any]) -> list[Any]:
    second = [i for i, packet in enumerate(packets) if packet.is_keyframe][1]
    return packets[second:]


@made("h264 mp4, variable rate")
def _variable(folder: Path) -> Path:
    steps = [40] * 15 + [200] * 15
    times = np.concatenate([[0], np.cumsum(steps)[:-1]]).tolist()
    return encode(folder / "vfr.mp4", "libx264", X264, times=times, base=Fraction(1, 1000))


@made("h264 mp4, last frame held")
def _held(folder: Path) -> Path:
    def hold(packets: list[Any]) -> list[Any]:
        packets[-1].duration = packets[0].duration * 12
        return packets

    plain = encode(folder / "p.mp4", "libx264", {"g": "12", "bf": "0"})
    return remux(plain, folder / "held.mp4", hold)


@made("h264 mp4, empty last packets")
def _empty(folder: Path) -> Path:
    data = bytearray(encode(folder / "e.mp4", "libx264", {"g": "12", "bf": "0"}).read_bytes())
    at = data.find(b"stsz")
    (count,) = struct.unpack_from(">I", data, at + 12)
    struct.pack_into(">2I", data, at + 16 + 4 * (count - 2), 0, 0)
    path = folder / "empty.mp4"
    path.write_bytes(data)
    return path


@made("h264 mp4, turned by a quarter")
def _turned(folder: Path) -> Path:
    return encode(folder / "turned.mp4", "libx264", X264, change=lambda stream: stream.set_display_rotation(90))


@made("h264 mp4, wide pixels")
def _wide(folder: Path) -> Path:
    def widen(stream: Any) -> None:
        stream.codec_context.sample_aspect_ratio = Fraction(4, 3)

    return encode(folder / "wide.mp4", "libx264", X264, change=widen)


@made("h264 ts, begins in the middle")
def _ts_middle(folder: Path) -> Path:
    data = KINDS["h264 ts"](folder).read_bytes()
    path = folder / "middle.ts"
    path.write_bytes(data[: 188 * 3] + data[188 * (len(data) // 188 // 3) :])
    return path


def joined(name: str, suffix: str, codec: str, options: dict[str, str]) -> None:
    """A kind that is two files one after the other, each of which begins at its own time."""

    def make(folder: Path) -> Path:
        parts = (range(15), range(15, 30))
        files = [encode(folder / f"{n[0]}{suffix}", codec, options, numbers=n) for n in parts]
        path = folder / f"joined{suffix}"
        path.write_bytes(b"".join(file.read_bytes() for file in files))
        return path

    KINDS[name] = make


joined("h264 ts, two joined", ".ts", "libx264", X264)
joined("mpeg2 mpg, two joined", ".mpg", "mpeg2video", B)


@made("vp8 webm of a browser")
def _browser(folder: Path) -> Path:
    """No duration, no index, no frame rate, uneven times."""
    times = (np.cumsum(np.random.default_rng(0).integers(28, 40, FRAMES)) - 28).tolist()
    base, live = Fraction(1, 1000), {"live": "1"}
    data = bytearray(
        encode(folder / "live.webm", "libvpx", SLOW, fps=1000, times=times, base=base, container=live).read_bytes()
    )
    at = data.find(b"\x23\xe3\x83")  # DefaultDuration becomes Void
    size = data[at + 3] & 0x7F
    if at > 0:
        data[at : at + 4 + size] = b"\xec" + bytes([0x80 | (2 + size)]) + bytes(2 + size)
    path = folder / "browser.webm"
    path.write_bytes(data)
    return path


@made("mpeg4 avi, packed B-frames")
def _packed(folder: Path) -> Path:
    """As old DivX encoders wrote it: a P-frame and the B-frame before it in one packet, and a stub in the next."""
    packets, header = _packets_of(encode(folder / "plain.avi", "mpeg4", {**B, "bf": "1"}))
    joined: list[tuple[bytes, bool]] = []
    for data, key in packets:
        if data[data.find(b"\x00\x00\x01\xb6") + 4] >> 6 == 2:  # a B-frame
            joined[-1] = (joined[-1][0] + data, joined[-1][1])
            joined.append((STUB, False))
        else:
            joined.append(((b"" if joined else b"\x00\x00\x01\xb2DivX503b1393p") + data, key))
    return _mpeg4_avi(folder / "packed.avi", "DX50", joined, header)


@made("mpeg4 avi, stubs of dropped frames")
def _stubs(folder: Path) -> Path:
    packets, header = _packets_of(encode(folder / "p4.avi", "mpeg4", {**B, "bf": "0"}))
    return _mpeg4_avi(
        folder / "stubs.avi",
        "FMP4",
        [piece for i, packet in enumerate(packets) for piece in (packet, (STUB, False))[: 1 + (i % 5 == 2)]],
        header,
    )


def _packets_of(path: Path) -> tuple[list[tuple[bytes, bool]], bytes | None]:
    """(content, whether it is a key packet) of each packet, and the header of the stream."""
    with av.open(str(path)) as film:
        stream = film.streams.video[0]
        return [(bytes(p), p.is_keyframe) for p in film.demux(stream) if p.size], stream.codec_context.extradata


def _mpeg4_avi(path: Path, tag: str, packets: list[tuple[bytes, bool]], header: bytes | None) -> Path:
    with av.open(str(path), "w") as out:
        stream = out.add_stream("mpeg4", rate=25)
        stream.width, stream.height, stream.pix_fmt = *SIZE, "yuv420p"
        stream.codec_context.codec_tag, stream.codec_context.extradata = tag, header
        for i, (data, key) in enumerate(packets):
            packet = av.Packet(data)
            packet.pts = packet.dts = i
            packet.time_base, packet.is_keyframe, packet.stream = Fraction(1, 25), key, stream
            out.mux(packet)
    return path


@made("h264 mp4, edit list of two parts")
def _parts(folder: Path) -> Path:
    """Frames 4 to 12 and 16 to 27, as a cutting program marks them without touching the stream."""
    data = bytearray(KINDS["h264 mp4, B-frames"](folder).read_bytes())
    at = data.find(b"edts") - 4
    (size,) = struct.unpack_from(">I", data, at)
    media, movie = 12800 // 25, 1000 // 25  # units per frame of the track and of the film
    begin = struct.unpack_from(">i", data, data.find(b"elst") + 16)[0]  # where frame 0 is shown
    parts = b"".join(struct.pack(">IiI", n * movie, begin + a * media, 1 << 16) for a, n in ((4, 9), (16, 12)))
    edits = struct.pack(">I4sI4sII", 24 + len(parts), b"edts", 16 + len(parts), b"elst", 0, 2) + parts
    data[at : at + size] = edits
    for box in (b"moov", b"trak"):
        where = data.find(box) - 4
        struct.pack_into(">I", data, where, struct.unpack_from(">I", data, where)[0] + len(edits) - size)
    path = folder / "parts.mp4"
    path.write_bytes(data)
    return path


def still_first(name: str, cover: bool) -> None:
    """A kind with a picture in the first stream, marked as a cover or not, and the film in the second."""

    def make(folder: Path) -> Path:
        film, path = KINDS["h264 mkv"](folder), folder / "still.mp4"
        with av.open(str(film)) as source, av.open(str(path), "w") as out:
            still = out.add_stream("mjpeg", rate=1)
            still.width, still.height, still.pix_fmt = *SIZE, "yuvj420p"
            if cover:
                still.disposition = Disposition.attached_pic
            stream = out.add_stream_from_template(source.streams.video[0])
            out.mux(still.encode(av.VideoFrame.from_ndarray(paint(99), "rgb24")))
            out.mux(still.encode())
            for packet in source.demux(video=0):
                if packet.size:
                    packet.stream = stream
                    out.mux(packet)
        return path

    KINDS[name] = make


still_first("h264 mp4, preview stream first", cover=False)
still_first("h264 mp4, cover picture first", cover=True)
