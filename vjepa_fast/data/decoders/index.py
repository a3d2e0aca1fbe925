"""The frame index of a video: which packet holds the n-th frame shown, when it is shown, and where reading may begin.

A frame's number is its place in the order in which a decode from the start shows the frames. A packet's number is its
place in the file. Legend: N frames, P packets, K key packets. Needs numpy alone; `scan` makes an index from a file.
"""

from __future__ import annotations

import json
import zlib
from dataclasses import dataclass, fields
from functools import cached_property

import numpy as np

from vjepa_fast.files import parse_json

FROM_START = -1  # the seek point that is the beginning of the file

_LARGEST = 512 * 2**20  # bytes that a packed index may unpack to: some 40 million frames
_FORMAT = 1  # of packed indices; another number: they are made anew
_NTSC = 1000 / 1001


@dataclass(frozen=True, eq=False)
class FrameIndex:
    """Where the frames of one video stream are.

    Attributes:
        order: int32 ``[N]``, the packet that holds each frame, in the order shown.
        pts: int64 ``[N]``, when each frame is shown, in units of ``time_base`` seconds, not descending.
        time_base: seconds per unit of ``pts``.
        rate: frames per second: of a film of constant rate as its header says where that fits; else the mean.
        constant: whether frames follow at equal times, up to the rounding of ``pts``.
        packets: P, empty ones not counted.
        key: int32 ``[K]``, numbers of the key packets. key_ts: int64, their time stamps. key_pos: int64, their places
            in the file, -1 where unknown. key_size: int32 and key_crc: uint32, bytes and checksum, to know them by.
        gaps: int32, packets that a decode of everything got no frame out of, though each should show one.
        seek: how to get to a packet: "time", "bytes" or "none" (read from the start).
        independent: every packet can be decoded alone.
        lost: packets that the container lists but the file does not hold.
        damaged: the decode that made the index met errors.
        turn: the display matrix's rotation and flip as (a, b, c, d), each -1, 0 or 1: x' = ax + cy, y' = bx + dy.
        aspect: width of a pixel over its height.
        interlaced: the first frame is marked so.
        width, height: of the coded picture. codec: FFmpeg's name.
    """

    order: np.ndarray
    pts: np.ndarray
    time_base: float
    rate: float
    constant: bool
    packets: int
    key: np.ndarray
    key_ts: np.ndarray
    key_pos: np.ndarray
    key_size: np.ndarray
    key_crc: np.ndarray
    gaps: np.ndarray
    seek: str
    independent: bool
    lost: int
    damaged: bool
    turn: list[int]
    aspect: float
    interlaced: bool
    width: int
    height: int
    codec: str

    @property
    def frames(self) -> int:
        """N, the number of frames shown."""
        return len(self.order)

    @cached_property
    def times(self) -> np.ndarray:
        """float64 ``[N]``: seconds from the first frame."""
        return (self.pts - self.pts[:1]) * self.time_base

    @cached_property
    def place(self) -> np.ndarray:
        """int32 ``[P]``: the number of the frame that each packet holds, -1 if it shows none."""
        place = np.full(self.packets, -1, np.int32)
        place[self.order] = np.arange(self.frames, dtype=np.int32)
        return place

    @cached_property
    def _points(self) -> tuple[np.ndarray, np.ndarray]:
        """Rows of ``key`` from which all later frames can be decoded (last: the start), and the first frame of each."""
        last_use = np.minimum.accumulate(self.order[::-1])[::-1]  # the earliest packet that frames from n on need
        place = self.place[self.key]
        rows = np.nonzero(place >= 0)[0] if self.seek != "none" else np.zeros(0, np.int64)
        rows = rows[(last_use[place[rows]] == self.key[rows]) & (self.key[rows] > 0)]
        return np.append(rows, FROM_START), place[rows]  # what lies before all others is at the place of index -1

    def seek_point(self, number: int) -> int:
        """Row of ``key`` of the last key packet from which frame ``number`` can be decoded, or `FROM_START`."""
        return int(self.seek_points(np.array([number]))[0])

    def seek_points(self, numbers: np.ndarray) -> np.ndarray:
        """`seek_point` of each of these frames."""
        rows, firsts = self._points
        return rows[firsts.searchsorted(numbers, side="right") - 1]

    def pack(self) -> bytes:
        """As bytes, compressed, for `unpack`."""
        blobs = [
            np.diff(self.order, prepend=0).astype("<i4").tobytes(),
            np.diff(self.pts, n=2, prepend=[0, 0]).astype("<i8").tobytes(),
            *(np.diff(getattr(self, name), prepend=0).astype("<i8").tobytes() for name in ("key", "key_ts", "key_pos")),
            self.key_size.astype("<i4").tobytes(),
            self.key_crc.astype("<u4").tobytes(),
            self.gaps.astype("<i4").tobytes(),
        ]
        facts = [getattr(self, name) for name in _FACTS]
        head = json.dumps([_FORMAT, len(self.order), len(self.key), len(self.gaps), *facts]).encode()
        return zlib.compress(head + b"\n" + b"".join(blobs), 6)

    @classmethod
    def unpack(cls, packed: bytes) -> FrameIndex:
        """The index that `pack` wrote; ValueError if these bytes are of something else or another version."""
        try:
            unpacker = zlib.decompressobj()
            content = unpacker.decompress(packed, _LARGEST)
            if not unpacker.eof:
                raise ValueError("too large, or cut short")
            head, body = content.split(b"\n", 1)
            version, n, k, g, *facts = parse_json(head)
            if version != _FORMAT or len(facts) != len(_FACTS):
                raise ValueError("another version")
            shape = (("<i4", n), ("<i8", n), ("<i8", k), ("<i8", k), ("<i8", k), ("<i4", k), ("<u4", k), ("<i4", g))
            columns, at = [], 0
            for dtype, length in shape:
                columns.append(np.frombuffer(body, dtype, length, at))
                at += columns[-1].nbytes
        except (zlib.error, UnicodeDecodeError, TypeError) as error:
            raise ValueError(f"not a frame index ({error})") from None
        order, pts, key, key_ts, key_pos, size, crc, gaps = columns
        return cls(
            order=order.cumsum(dtype=np.int32),
            pts=pts.cumsum().cumsum(),
            key=key.cumsum(dtype=np.int32),
            key_ts=key_ts.cumsum(),
            key_pos=key_pos.cumsum(),
            key_size=size,
            key_crc=crc,
            gaps=gaps,
            **dict(zip(_FACTS, facts, strict=True)),
        )


_ARRAYS = ("order", "pts", "key", "key_ts", "key_pos", "key_size", "key_crc", "gaps")
_FACTS = tuple(f.name for f in fields(FrameIndex) if f.name not in _ARRAYS)


def even_out(pts: np.ndarray, longest: float) -> np.ndarray:
    """Time stamps of joined recordings as one line of time, int64 ``[N]``.

    A step back, or one longer than ``longest``, is where a recording ends and the next one begins; the median step
    takes its place.
    """
    steps = np.diff(pts)
    jumps = (steps < 0) | (steps > longest)
    if not jumps.any():
        return pts
    steps[jumps] = int(np.median(steps[~jumps])) if not jumps.all() else 1
    return pts[0] + np.concatenate([[0], np.cumsum(steps)])


def rate_of(pts: np.ndarray, time_base: float, announced: list[float]) -> tuple[float, bool]:
    """Frames per second, and whether the rate is constant.

    Args:
        pts: int64 ``[N]``, ascending.
        time_base: seconds per unit.
        announced: what the header says, the most trusted first; a constant rate is the first of them that fits.
    """
    if len(pts) < 2 or pts[-1] == pts[0]:
        return (announced[0] if announced else 1.0), True
    tick = (pts[-1] - pts[0]) / (len(pts) - 1)  # of the clock, per frame; how long the last one is shown does not count
    off = pts - pts[0] - tick * np.arange(len(pts))
    constant = bool(np.abs(off).max() < 0.5 * tick)  # so that a frame's number and its time say the same
    measured = 1 / (tick * time_base)
    if not constant:
        return measured, False
    slack = max(5e-4, 1.5 / (pts[-1] - pts[0]))  # time stamps are rounded
    for rate in announced:
        if abs(rate / measured - 1) <= slack:
            return rate, True
    whole = max(1, round(measured))
    near = min((whole, whole * _NTSC), key=lambda rate: abs(rate - measured))
    return (float(near) if abs(near / measured - 1) <= slack else measured), True
