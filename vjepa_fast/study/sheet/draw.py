"""Rows of frames as pictures, with and without masks."""

from __future__ import annotations

import io
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from vjepa_fast.files import write_bytes
from vjepa_fast.study.sheet.read import CONTEXT, NEITHER, PREDICTED, Sheet, ShownClip

if TYPE_CHECKING:
    from PIL.Image import Image

COLUMNS = 8  # frames shown of one clip
GAP = 4  # pixels between frames
# What tokens are covered with: colour, and how much of it. Colour-blind readers can tell them apart.
COVER = {CONTEXT: ((0, 114, 178), 0.0), PREDICTED: ((230, 145, 0), 0.6), NEITHER: ((60, 60, 66), 0.85)}
WORDS = {CONTEXT: "context", PREDICTED: "predicted", NEITHER: "neither"}
LEGEND = {
    CONTEXT: "context: the frame as it is",
    PREDICTED: "predicted",
    NEITHER: "neither: left out where masks are cut to one length for the whole batch",
}


def places(clip: ShownClip) -> list[int]:
    """Which of its frames are shown: all, or `COLUMNS` evenly spread; of an image one."""
    if clip.numbers is None:
        return [0]
    total, columns = len(clip.frames), min(COLUMNS, len(clip.frames))
    return [i * total // columns for i in range(columns)]


def captions(clip: ShownClip) -> list[str]:
    """Number and time of each frame shown."""
    if clip.numbers is None or clip.seconds is None:
        return ["image"]
    return [f"{clip.numbers[i]} · {clip.seconds[i]:.2f} s" for i in places(clip)]


def rows(clip: ShownClip) -> list[tuple[str, np.ndarray]]:
    """(name, frames uint8 ``[n, S, S, 3]``): the frames themselves, then covered by each mask."""
    frames = clip.frames[places(clip)]
    found = [("clip", frames)]
    for number, mask in enumerate(clip.masks, start=1):
        steps = [i * len(mask) // len(clip.frames) for i in places(clip)]
        found.append((f"mask {number}" if len(clip.masks) > 1 else "mask", _covered(frames, mask[steps])))
    return found


def share(clip: ShownClip, number: int) -> str:
    """How much of the tokens of a mask is context and predicted, in words."""
    mask = clip.masks[number]
    return ", ".join(f"{(mask == value).mean():.0%} {WORDS[value]}" for value in (CONTEXT, PREDICTED))


def _covered(frames: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Frames ``[n, S, S, 3]`` under the colours of their tokens ``[n, H, W]``."""
    large = mask.repeat(frames.shape[1] // mask.shape[1], 1).repeat(frames.shape[2] // mask.shape[2], 2)
    out = frames.astype(np.float32)
    for value, (colour, amount) in COVER.items():
        out[large == value] += amount * (np.array(colour, np.float32) - out[large == value])
    return out.astype(np.uint8)


def strip(frames: np.ndarray, side: int) -> Image:
    """The frames side by side, each ``side`` pixels wide."""
    from PIL import Image as images

    row = images.new("RGB", (len(frames) * (side + GAP) - GAP, side), "white")
    for i, frame in enumerate(frames):
        row.paste(images.fromarray(frame).resize((side, side), images.Resampling.BICUBIC), (i * (side + GAP), 0))
    return row


def write_png(sheet: Sheet, path: Path, side: int = 144) -> None:
    """The sheet as one picture."""
    from PIL import Image as images
    from PIL import ImageDraw, ImageFont

    left, line, margin = 190, 20, 16
    width = left + COLUMNS * (side + GAP) + margin
    per_clip = [2 * line + len(rows(clip)) * (side + GAP) + line + margin for clip in sheet.clips]
    picture = images.new("RGB", (width, sum(per_clip) + (4 + len(sheet.bad)) * line + 2 * margin), "white")
    draw, y = ImageDraw.Draw(picture), margin
    font, bold = ImageFont.load_default(13), ImageFont.load_default(16)

    def text(x: int, string: str, colour: str = "#1f2733", face=font) -> None:
        draw.text((x, y), string.encode("latin-1", "replace").decode("latin-1"), colour, face)

    text(margin, f"{len(sheet.clips)} clips of {sheet.manifest}", face=bold)
    y += line + 4
    text(margin, ";  ".join(f"{name}: {what}" for name, what in sheet.settings), "#5a6472")
    y += line
    x = margin
    for value, (colour, amount) in COVER.items():
        if value != CONTEXT:
            draw.rectangle((x, y + 2, x + 12, y + 14), tuple(round(255 + amount * (c - 255)) for c in colour))
            x += 20
        text(x, LEGEND[value], "#5a6472")
        x += 40 + round(draw.textlength(LEGEND[value], font))
    y += line + margin
    for clip, height in zip(sheet.clips, per_clip, strict=True):
        top = y
        text(margin, f"{clip.path}", face=bold)
        y += line
        text(margin, f"label {clip.label} {clip.name}".rstrip() + f";  {clip.facts}", "#5a6472")
        y += line
        for number, (name, frames) in enumerate(rows(clip)):
            picture.paste(strip(frames, side), (left, y))
            text(margin, name)
            if number:
                y += line
                for part in share(clip, number - 1).split(", "):
                    text(margin, part, "#5a6472")
                    y += line
                y -= 3 * line
            y += side + GAP
            if number == 0:
                for i, caption in enumerate(captions(clip)):
                    text(left + i * (side + GAP), caption, "#5a6472")
                y += line
        y = top + height
    for bad, reason in sheet.bad:
        text(margin, f"unreadable: {bad}: {reason}", "#a33131")
        y += line
    buffer = io.BytesIO()
    picture.save(buffer, "png")
    write_bytes(path, buffer.getvalue())
