"""Which videos a decoder that knows nothing of the `FrameIndex` numbers and shows as the index does."""

from __future__ import annotations

import numpy as np

from vjepa_fast.data.decoders.index import FrameIndex
from vjepa_fast.data.decoders.picture import UPRIGHT
from vjepa_fast.data.media import ReadOptions, one_line
from vjepa_fast.data.members import open_file

_EBML = b"\x1aE\xdf\xa3"
_BOXES = (b"ftyp", b"moov", b"mdat", b"wide", b"free", b"skip")


def why_not_plain(path: str, index: FrameIndex, options: ReadOptions) -> str:
    """Why frames cannot be told by their time stamps, or are not shown as they are coded; empty if neither.

    MP4 and Matroska store when each frame is shown; other containers may store when it is decoded.
    """
    if index.turn != UPRIGHT or index.aspect != 1:
        return "turned pictures or pixels that are not square"
    if index.interlaced and options.deinterlace:
        return "interlaced"
    if index.damaged or index.lost or len(index.gaps):
        return "damaged"
    if index.seek != "time" or len(np.unique(index.pts)) != index.frames:
        return "no time stamps to seek by"
    in_order = index.packets == index.frames and bool((np.diff(index.order) > 0).all())
    try:
        with open_file(path) as file:
            head = file.read(8)
    except OSError as error:
        return f"it cannot be opened: {one_line(error)}"
    if in_order or head[:4] == _EBML or head[4:] in _BOXES:
        return ""
    return "a container that does not store when a frame is shown"
