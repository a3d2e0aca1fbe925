"""A sheet as a file: ``.html``, a page with its pictures inside, or ``.png``."""

from __future__ import annotations

import base64
import io
import os
from pathlib import Path
from typing import Any

from vjepa_fast.errors import UserError, printable
from vjepa_fast.files import write_text
from vjepa_fast.study import pages
from vjepa_fast.study.sheet import draw
from vjepa_fast.study.sheet.read import Sheet, ShownClip

SUFFIXES = (".html", ".png")
_TEMPLATE = Path(__file__).parent / "templates" / "sheet.html.j2"
_LARGEST = 256  # pixels of a frame on the page


def check_name(path: str | Path) -> Path:
    """The path, if its suffix says what to write; else UserError."""
    if (path := Path(path)).suffix.lower() not in SUFFIXES:
        raise UserError(f"--out {path}: expected a name that ends in {' or '.join(SUFFIXES)}")
    return path


def write_sheet(sheet: Sheet, path: str | Path) -> None:
    """Write a sheet as a page or a picture, by the suffix of ``path``. UserError if it cannot be written."""
    path = check_name(path)
    if path.suffix.lower() == ".png":
        draw.write_png(sheet, path)
        return
    legend = [(draw.LEGEND[value], colour, amount) for value, (colour, amount) in draw.COVER.items()]
    content = {
        "sheet": sheet,
        "manifest": printable(sheet.manifest),
        "clips": [_clip(clip) for clip in sheet.clips],
        "bad": [(printable(bad), printable(reason)) for bad, reason in sheet.bad],
        "legend": legend,
        "columns": draw.COLUMNS,
    }
    write_text(path, pages.render(_TEMPLATE, content))


def _clip(clip: ShownClip) -> dict[str, Any]:
    """What the template shows of one clip."""
    side = min(_LARGEST, max(96, clip.frames.shape[1]))
    rows = [
        {"name": name, "note": draw.share(clip, i - 1) if i else "", "picture": _uri(frames, side), "n": len(frames)}
        for i, (name, frames) in enumerate(draw.rows(clip))
    ]
    name = printable(os.path.basename(clip.path))
    return {"clip": clip, "file": name, "path": printable(clip.path), "captions": draw.captions(clip), "rows": rows}


def _uri(frames: Any, side: int) -> str:
    buffer = io.BytesIO()
    draw.strip(frames, side).save(buffer, "jpeg", quality=88)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()
