"""Decoded frames as people see them: RGB, upright, with square pixels, and without the comb of interlacing if asked."""

from __future__ import annotations

from fractions import Fraction
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from av.video.frame import VideoFrame

    from vjepa_fast.data.decoders.index import FrameIndex

UPRIGHT = [1, 0, 0, 1]


def turn_of(frame: VideoFrame) -> list[int]:
    """The rotation and flip by right angles that a frame's display matrix asks for, as ``FrameIndex.turn``.

    A matrix that turns by another angle is left out.
    """
    matrix = frame.side_data.get("DISPLAYMATRIX")
    if matrix is None:
        return UPRIGHT
    a, b, _, c, d = np.sign(np.frombuffer(bytes(matrix), "<i4", 5)).tolist()
    return [a, b, c, d] if abs(a * d - b * c) == 1 and (a == d == 0 or b == c == 0) else UPRIGHT


def turned(pictures: np.ndarray, turn: list[int]) -> np.ndarray:
    """Pictures ``[..., H, W, 3]`` turned and flipped by ``FrameIndex.turn``; a view."""
    a, b, c, d = turn
    if a == 0:  # x' comes from y
        pictures, a, d = pictures.swapaxes(-3, -2), c, b
    pictures = pictures[..., ::-1, :] if a < 0 else pictures
    return pictures[..., ::-1, :, :] if d < 0 else pictures


def shown_size(index: FrameIndex) -> tuple[int, int]:
    """(height, width) in which a video's frames are shown, turned and with square pixels."""
    height, width = index.height, max(1, round(index.width * index.aspect))
    return (width, height) if index.turn[0] == 0 else (height, width)


class Painter:
    """Turns decoded frames of one video into RGB.

    Args:
        index: of the video.
        size: (height, width) of the result; None: as shown.
        deinterlace: of frames that are marked as interlaced, fill the second field from the first.
    """

    def __init__(self, index: FrameIndex, size: tuple[int, int] | None, deinterlace: bool) -> None:
        from av.video.reformatter import VideoReformatter

        self._turn, self._deinterlace = index.turn, deinterlace
        self._reformatter = VideoReformatter()
        self._form: dict[str, Any] = {"format": "rgb24", "threads": 1}
        if size is not None or index.aspect != 1:
            size = size or shown_size(index)
            height, width = size[::-1] if index.turn[0] == 0 else size
            self._form |= {"height": height, "width": width, "interpolation": "BILINEAR"}

    def paint(self, frame: VideoFrame) -> np.ndarray:
        """uint8 ``[H, W, 3]``."""
        if self._deinterlace and frame.interlaced_frame:
            frame = _one_field(frame)
        return turned(self._reformatter.reformat(frame, **self._form).to_ndarray(), self._turn)


def _one_field(frame: VideoFrame) -> VideoFrame:
    """The second field replaced from the first; of this picture alone, so that every start gives the same."""
    from av.filter import Graph

    graph = Graph()
    source = graph.add_buffer(
        width=frame.width, height=frame.height, format=frame.format, time_base=frame.time_base or Fraction(1)
    )
    graph.link_nodes(source, graph.add("estdif", "mode=frame"), graph.add("buffersink")).configure()
    graph.push(frame)
    graph.push(None)
    return graph.vpull()
