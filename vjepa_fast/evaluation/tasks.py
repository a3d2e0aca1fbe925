"""The evaluation tasks as data: classes, frames and views of each, and the checks of a manifest against them.

Sources of frames and views: V-JEPA 2 (arXiv:2506.09985), frozen evaluation, for SSv2, K400 and Diving-48; what the
others have is this package's choice and marked so. A synthetic suite is read as the encoder was trained.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from itertools import combinations
from typing import TypeAlias

import numpy as np

from vjepa_fast.data.manifests.manifest import Manifest
from vjepa_fast.errors import DataError
from vjepa_fast.registry import Registry

Labels: TypeAlias = np.ndarray | Sequence[int]


@dataclass(frozen=True)
class Task:
    """``classes``: how many labels there must be, 0 to classes - 1. ``num_frames`` and ``frame_step``: of a clip, None
    as the encoder was trained. ``clips`` x ``crops``: views of a video. ``epochs``: of the attentive probe.
    ``class_list``: its classes in label order, one a line, a file in ``evaluation/data`` or an absolute path.
    """

    name: str
    title: str
    classes: int
    num_frames: int | None = None
    frame_step: int | None = None
    clips: int = 1
    crops: int = 1
    epochs: int = 20
    class_list: str | None = None
    ours: bool = False  # frames and views are not from a publication


def _check(name: str, task: Task) -> None:
    if not isinstance(task, Task) or task.name != name:
        raise TypeError(f"evaluation task {name!r} must be a Task of that name, got {task!r}")


TASKS: Registry[Task] = Registry("evaluation task", check=_check)
for _task in (
    Task("diving48", "Diving-48", 48, 32, 2, 4, 3, epochs=100, class_list="diving48.txt"),
    Task("ssv2", "Something-Something V2", 174, 16, 4, 2, 3, class_list="ssv2.txt"),
    Task("k400", "Kinetics-400", 400, 16, 4, 8, 3, class_list="k400.txt"),
    Task("imagenet100", "ImageNet-100", 100, 16, class_list="imagenet100.txt", ours=True),
    Task("ucf101", "UCF-101", 101, 16, 4, 4, 3, ours=True),
    Task("motion8", "synthetic motion, eight directions", 8, ours=True),
    Task("dive", "synthetic dives, ordered triples", 6, ours=True),
    Task("order", "synthetic order of two events", 12, ours=True),
    Task("objects", "synthetic still objects", 48, ours=True),
):
    TASKS.add(_task.name, _task)


def get_task(name: str) -> Task:
    """The task of a name; ConfigError lists the names."""
    return TASKS.get_named(name, "task")


def class_names(task: Task) -> list[str]:
    """The classes in label order, where a list is known, else an empty list."""
    if task.class_list is None:
        return []
    text = files("vjepa_fast.evaluation").joinpath("data").joinpath(task.class_list).read_text(encoding="utf-8")
    return [line for line in text.splitlines() if line and not line.startswith("#")]


def check_labels(
    labels: Labels, where: str | os.PathLike, *, classes: int | None = None, task: Task | None = None
) -> int:
    """The number of classes of a training part's ``labels`` int ``[n]``.

    Raises DataError for no samples, for labels outside 0 to classes - 1 and for labels that do not occur (gaps);
    ``classes`` is the task's number, else the argument, else the highest label + 1. ``where`` names the manifest.
    """
    known = np.unique(np.asarray(labels))
    if known.size == 0:
        raise DataError(f"{where}: no samples")
    expected = task.classes if task else classes
    what = f"{task.title} has {expected} classes" if task else f"{expected} classes are expected"
    if known[0] < 0 or (expected is not None and known[-1] >= expected):
        strange = known[0] if known[0] < 0 else known[-1]
        rule = f"out of range; {what}, labels 0 to {expected - 1}" if expected else "negative; labels count from 0"
        raise DataError(f"{where}: label {strange} is {rule}")
    count = expected or int(known[-1]) + 1
    missing = np.setdiff1d(np.arange(count), known)
    if missing.size:
        names = class_names(task) if task else []
        shown = [f"{m} ({names[m]})" if names else str(m) for m in missing[:5]]
        more = f" and {missing.size - 5} more" if missing.size > 5 else ""
        hint = f"{what}, found {known.size}" if expected else "number the classes 0, 1, 2, ... without gaps"
        raise DataError(f"{where}: no sample of label {', '.join(shown)}{more}; {hint}")
    return count


def check_within(labels: Labels, where: str | os.PathLike, classes: int) -> None:
    """Labels of a validation or test part: some, and none that the training part does not have. DataError."""
    y = np.asarray(labels)
    if y.size == 0:
        raise DataError(f"{where}: no samples")
    strange = y[(y < 0) | (y >= classes)]
    if strange.size:
        raise DataError(f"{where}: label {strange[0]} is none of the training part, which has 0 to {classes - 1}")


def check_apart(manifests: Mapping[str, Manifest]) -> None:
    """DataError where two of the Manifests (by role) list the same file: what is fitted or chosen on one part would be
    measured on it.
    """
    listed = {role: {os.path.realpath(p) for p in m.paths} for role, m in manifests.items()}
    for one, other in combinations(listed, 2):
        if shared := sorted(listed[one] & listed[other]):
            raise DataError(
                f"{manifests[other].path}: {len(shared)} files are in the {one} part as well ({shared[0]}"
                f"{', ...' if len(shared) > 1 else ''}); {one} and {other} part must be apart"
            )


def check_manifests(manifests: Mapping[str, Manifest], task: Task | None = None) -> int:
    """The number of classes of the parts "train", "val" (optional) and "test" of Manifests; DataError as
    :func:`check_labels`, :func:`check_within` and :func:`check_apart`.
    """
    check_apart({role: m for role, m in manifests.items() if role in ("train", "val", "test")})
    classes = check_labels(manifests["train"].labels, manifests["train"].path, task=task)
    for part in ("val", "test"):
        if part in manifests:
            check_within(manifests[part].labels, manifests[part].path, classes)
    return classes
