"""The page: one file with its pictures inside. All that comes from files is escaped by the template."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np

from vjepa_fast.errors import printable
from vjepa_fast.files import write_text
from vjepa_fast.study import pages
from vjepa_fast.study.demo import figures
from vjepa_fast.study.figures import png
from vjepa_fast.study.sheet import draw
from vjepa_fast.study.sheet.read import ShownClip
from vjepa_fast.study.show.read import Near, Shown

TEMPLATE = Path(__file__).parent / "templates" / "show.html.j2"
SIDE = 112  # pixels of a frame


def write_page(shown: Shown, path: str | Path) -> None:
    """Write the page. UserError where it cannot be written."""
    runs = [shown.run] if shown.run is not None else []
    content = {
        "title": printable(shown.title),
        "encoder": printable(shown.encoder),
        "settings": {name: printable(text) for name, text in shown.settings.items()},
        "last": shown.run.metrics[-1] if shown.run is not None else None,
        "loss_svg": figures.loss_curves(runs) if runs else None,
        "monitor_svg": figures.monitor_curves(runs) if runs else None,
        "masks": [_masked(clip) for clip in shown.sheet.clips] if shown.sheet is not None else [],
        "legend": [(draw.LEGEND[value], colour, amount) for value, (colour, amount) in draw.COVER.items()],
        "maps": [
            (_name(m.path), {k: figures.strip(v, SIDE) for k, v in {"frames": m.frames, **m.maps}.items()})
            for m in shown.maps
        ],
        "attention": [
            (
                _name(m.path),
                {"frames": figures.strip(m.frames, SIDE)} | {k: _over(m.frames, v) for k, v in m.rollouts.items()},
            )
            for m in shown.maps
        ],
        "near": [_near(near) for near in shown.near],
        "notes": [printable(note) for note in shown.notes],
    }
    write_text(Path(path), pages.render(TEMPLATE, content), hint="choose another place with --out")


def _masked(clip: ShownClip) -> dict[str, Any]:
    rows = [
        (name, draw.share(clip, i - 1) if i else "", _strip(frames)) for i, (name, frames) in enumerate(draw.rows(clip))
    ]
    return {"file": _name(clip.path), "facts": printable(clip.facts), "captions": draw.captions(clip), "rows": rows}


def _strip(frames: np.ndarray) -> str:
    return png(np.asarray(draw.strip(frames, SIDE)))


def _over(frames: np.ndarray, rollout: np.ndarray) -> str:
    return figures.strip(figures.overlay(frames, rollout), SIDE)


def _near(near: Near) -> dict[str, Any]:
    others = [(_name(path), png(_small(frame)), f"{cosine:+.2f}") for path, frame, cosine in near.others]
    return {"file": _name(near.path), "picture": png(_small(near.frame)), "others": others}


def _small(frame: np.ndarray) -> np.ndarray:
    from PIL import Image

    return np.asarray(Image.fromarray(frame).resize((SIDE, SIDE), Image.Resampling.BICUBIC))


def _name(path: str) -> str:
    return printable(os.path.basename(path))
