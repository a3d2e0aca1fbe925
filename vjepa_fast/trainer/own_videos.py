"""From a folder of videos to a manifest that can be trained on: `prepare_videos`."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vjepa_fast.config.given import quoted
from vjepa_fast.data.manifests.check import check_manifest, keep_indices
from vjepa_fast.data.manifests.clean import write_clean
from vjepa_fast.data.manifests.manifest import load_manifest
from vjepa_fast.data.prepare import Request, prepare
from vjepa_fast.data.sampling import Sampling
from vjepa_fast.errors import DataError, UserError
from vjepa_fast.files import parse_json, write_json, write_text
from vjepa_fast.trainer.sizes import cores

MARK = "own_videos.json"  # beside the manifest: whose videos these are, and the pace
# Frames of a clip, 16 or 8 by the table of sizes, and how often one is taken: tried in turn.
PACES = (
    (16, {"fps": 8}),
    (16, {"frame_sample_rate": 2}),
    (16, {"frame_sample_rate": 1}),
    (8, {"frame_sample_rate": 1}),
)
MOST = 0.9  # share of the videos that must be long enough for a clip at a pace
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Prepared:
    """What there is to train on.

    Attributes:
        manifest: path. videos: number in it. hours: of them all.
        frames: that a clip may have at most. pace: key of ``data`` and its value.
        left_out: (path, reason) of each video that is not in it. notes: sentences for the user.
    """

    manifest: str
    videos: int
    hours: float
    frames: int
    pace: dict[str, int]
    left_out: list[tuple[str, str]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def overrides(self) -> list[str]:
        """What a recipe needs to train on them."""
        pace = dict.fromkeys(("fps", "frame_sample_rate", "duration")) | self.pace
        values = {"datasets_weights": None, **pace}
        rest = [f"data.{key}={json.dumps(value)}" for key, value in values.items()]
        return [f"data.datasets=[{quoted(os.path.abspath(self.manifest))}]", *rest]


def made_from(out: Path) -> str | None:
    """The folder whose videos are prepared in ``out``; None if nothing is."""
    try:
        return parse_json((out / MARK).read_text(encoding="utf-8"))["videos"]
    except (OSError, ValueError, KeyError, TypeError):
        return None


def prepare_videos(
    folder: str | Path, out: Path, *, workers: int | None = None, on_progress: Progress | None = None
) -> Prepared:
    """List the videos below a folder and read a clip of each; what cannot be read is left out.

    ``out`` gets what `prepare` writes, and ``own_videos.json``; ``quarantine.jsonl`` there names what was left out.
    Clips are read at 8 frames a second, or at shorter steps where many videos are shorter than two seconds.

    Raises:
        DataError: there is no video that can be read; an ``out`` that was not there is then not there.
    """
    folder, there = Path(folder).expanduser(), out.exists()
    if not folder.is_dir():
        raise DataError(f"{folder}: no such folder; --videos names the folder that holds your videos")
    try:
        report = prepare("videos", Request(source=folder, out=out), workers=workers or cores(), on_progress=on_progress)
        path = report.parts["train"]["manifest"]
        rows = _read_rows(out / "train.info.jsonl")
        frames, pace = choose_pace([(row["frames"], row["fps"]) for row in rows if row["status"] == "ok"])
        bad = _checked(path, frames, pace, on_progress)
    except BaseException as error:
        if not there:
            shutil.rmtree(out, ignore_errors=True)
        if isinstance(error, DataError):
            reason = str(error).removeprefix(f"{out / 'quarantine.jsonl'}: ").removeprefix(f"{folder}: ")
            raise DataError(f"{folder}: {reason}") from None
        raise
    quarantine = _read_rows(out / "quarantine.jsonl")
    quarantine += [{"part": "train", "path": p, "status": "bad", "reason": reason} for p, reason in bad]
    write_text(out / "quarantine.jsonl", "".join(json.dumps(row) + "\n" for row in quarantine))
    left_out = [(row["path"], row["reason"].removeprefix(f"{row['path']}: ")) for row in quarantine]
    manifest = load_manifest(path)
    notes = [*report.notes, *keep_indices(manifest)]
    write_json(out / MARK, {"videos": os.path.abspath(folder), **pace, "left_out": len(left_out)})
    lost = {p for p, _ in bad}
    hours = sum(row["seconds"] for row in rows if row["status"] == "ok" and row["path"] not in lost) / 3600
    return Prepared(path, len(manifest), hours, frames, pace, left_out, notes)


def choose_pace(videos: list[tuple[int, float]]) -> tuple[int, dict[str, int]]:
    """Frames of a clip and how often they are taken: the first of `PACES` at which most videos, (frames, frames a
    second) of each, are as long as a clip.
    """
    for frames, pace in PACES:
        sampling = _sampling(pace)
        fit = sum(total > (frames - 1) * sampling.step(rate, frames) for total, rate in videos)
        if fit >= MOST * len(videos):
            return frames, pace
    return PACES[-1]


def _sampling(pace: dict[str, int]) -> Sampling:
    return Sampling(fps=pace.get("fps"), frame_step=pace.get("frame_sample_rate"))


def _checked(path: str, frames: int, pace: dict[str, int], on_progress: Progress | None) -> list[tuple[str, str]]:
    """(path, reason) of the samples of which no clip can be read, taken out of the manifest."""
    manifest = load_manifest(path)

    def show(done: float) -> None:
        if on_progress is not None:
            on_progress("reading a clip of each", int(done), len(manifest))

    bad = check_manifest(manifest, num_frames=frames, sampling=_sampling(pace), workers=cores(), on_progress=show)
    if bad:
        try:
            write_clean(manifest, [p for p, _ in bad], path)
        except DataError:
            raise DataError(f"none of its {len(manifest)} videos can be used; the first: {bad[0][1]}") from None
    return bad


def _read_rows(path: Path) -> list[dict[str, Any]]:
    try:
        return [parse_json(line) for line in path.read_text(encoding="utf-8").splitlines()]
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
