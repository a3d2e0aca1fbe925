"""Rendered suites as tasks of the worker pool: render the videos, decode them once for all evaluations.

A suite lies in ``<folder>/suites/<name>/``, its decoded clips in ``<folder>/cache/<name>.safetensors``.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from vjepa_fast.data.synthetic import suite_values
from vjepa_fast.files import atomic_path
from vjepa_fast.study.jobs.pool import Task
from vjepa_fast.study.run.training import has_key, leave_key

if TYPE_CHECKING:
    from vjepa_fast.evaluation import ClipSet

SIZES = {  # clips by suite and part, of a study
    "motion8": {"train": 800, "val": 200, "test": 480},
    "order": {"train": 720, "val": 180, "test": 480},
    "objects": {"train": 960, "val": 240, "test": 480},
    "dive": {"train": 720, "val": 180, "test": 480},
    "fewshot": {"train": 432, "val": 360, "test": 864},
    "fewmotion": {"train": 360, "val": 180, "test": 480},
}
# Sampling weights of the suites that each regime trains on: the published ones, 0.2 for the single data set, 0.6 for
# other videos, 0.2 for images. `single` has neither the shapes nor the colours of `fewshot`: what mixing adds is not
# there already.
WEIGHTS = {"single": {"motion8": 1.0}, "mixed": {"motion8": 0.2, "dive": 0.3, "order": 0.3, "objects": 0.2}}


def manifests(folder: Path, name: str, sizes: Mapping[str, int]) -> dict[str, str]:
    """Paths of a suite's manifests by part; parts of no clips have none."""
    return {part: str(folder / "suites" / name / f"{part}.csv") for part, n in sizes.items() if n}


def cached(folder: Path, name: str) -> str:
    """Path of a suite's decoded clips."""
    return str(folder / "cache" / f"{name}.safetensors")


def view_of(data) -> dict[str, int]:
    """The centre clip that encoders are evaluated on, of a ``data`` section of a Config."""
    step = data.frame_sample_rate or 1
    return {"num_frames": max(data.dataset_fpcs), "crop_size": data.crop_size, "frame_step": step}


def render_task(folder: Path, name: str, sizes: Mapping[str, int], video: Mapping[str, int], rank: int = 0) -> Task:
    """The task ``render-<name>``. ``video``: size, frames, fps and seed."""
    identity = [name, sizes, video, suite_values(name)]
    place = {"name": name, "folder": str(folder / "suites" / name), "splits": sizes}
    arguments = {**place, "key": json.dumps(identity, sort_keys=True), **video}
    check = lambda found: all(map(os.path.exists, found.values()))  # noqa: E731
    return Task(f"render-{name}", render, arguments, rank=rank, identity=identity, check=check)


def decode_task(folder: Path, name: str, sizes: Mapping[str, int], view: Mapping[str, int], rank: int = 0) -> Task:
    """The task ``decode-<name>``, of the parts that are evaluated."""
    arguments = {
        "manifests": manifests(folder, name, sizes),
        "parts": [part for part in ("train", "val", "test") if sizes.get(part)],
        "view": dict(view),
        "path": cached(folder, name),
    }
    needs, identity = (f"render-{name}",), [name, view]
    return Task(f"decode-{name}", decode, arguments, needs, rank, identity=identity, check=os.path.exists)


def render(
    name: str, folder: str, splits: dict, size: int, frames: int, fps: int, seed: int, key: str
) -> dict[str, str]:
    """Render a suite, or what is missing of it; returns the manifests by part.

    What was rendered for another ``key`` is removed first; a folder that this function did not make is refused.
    """
    from vjepa_fast.data.synthetic import render_suite

    if has_key(folder) and not has_key(folder, key):
        shutil.rmtree(folder)
    if not Path(folder).exists():
        leave_key(folder, key)
    return render_suite(name, folder, splits=splits, size=size, frames=frames, fps=fps, seed=seed, workers=1)


def decode(manifests: dict[str, str], parts: list[str], view: dict, path: str) -> str:
    """Decode the centre views of a suite's parts once, into one file that all evaluations read; returns its path."""
    import torch
    from safetensors.torch import save_file

    from vjepa_fast import data
    from vjepa_fast.evaluation import decode_clips

    tensors, meta = {}, {}
    for part in parts:
        clips = decode_clips(data.load_manifest(manifests[part]), **view)
        tensors[f"{part}.clips"], tensors[f"{part}.labels"] = clips.clips, torch.from_numpy(clips.labels)
        meta[f"{part}.hash"], meta["images"] = clips.hash, str(clips.images)
    with atomic_path(path) as temporary:
        save_file(tensors, temporary, metadata=meta)
    return path


def load_clips(path: str, name: str) -> dict[str, ClipSet]:
    """The ClipSets by part that `decode` wrote."""
    from safetensors import safe_open

    from vjepa_fast.evaluation import ClipSet

    with safe_open(path, "pt") as file:
        meta, parts = file.metadata(), sorted({key.split(".")[0] for key in file.keys()})  # noqa: SIM118
        return {
            part: ClipSet(
                file.get_tensor(f"{part}.clips"),
                file.get_tensor(f"{part}.labels").numpy(),
                meta[f"{part}.hash"],
                f"{name}-{part}",
                meta["images"] == "True",
            )
            for part in parts
        }
