"""The published few-shot splits: their class lists, the list files of other code, and what they select of a manifest.

Class lists: ``evaluation/data/fewshot_classes.json`` (CMN: kinetics100, ssv2_small; OTAM as TRX uses it: ssv2_full,
numbers only; ARN: ucf101, hmdb51).
"""

from __future__ import annotations

import json
import os
from collections import Counter
from functools import cache
from pathlib import Path

import numpy as np

from vjepa_fast.data.prepare.find import Files
from vjepa_fast.data.prepare.lists import read_pairs
from vjepa_fast.errors import DataError
from vjepa_fast.evaluation.choices import check_choice
from vjepa_fast.evaluation.fewshot.leakage import class_keys, class_names

PARTS = ("train", "val", "test")
_FILE = Path(__file__).parents[1] / "data" / "fewshot_classes.json"


@cache
def _all_splits() -> dict[str, dict[str, tuple[str, ...]]]:
    content = json.loads(_FILE.read_text(encoding="utf-8"))
    return {k: {p: tuple(v[p]) for p in PARTS} for k, v in content.items() if k != "source"}


def split_names() -> tuple[str, ...]:
    """Names of the splits whose class lists come with the package."""
    return tuple(_all_splits())


def class_split(name: str) -> dict[str, tuple[str, ...]]:
    """Class names of the parts train, val, test of a published split. ConfigError for an unknown one."""
    check_choice("few-shot split", name, split_names())
    return _all_splits()[name]


def read_list(path: str | os.PathLike) -> list[tuple[str, str]]:
    """(class, video) of each line of a split list of CMN, TRX or HyRSM, as `read_pairs`; DataError as there."""
    return [(name, video) for _, name, video in read_pairs(Path(path))]


def manifest_from_list(path: str | os.PathLike, root: str | os.PathLike):
    """(data.Manifest, class names) of a split list whose videos lie below ``root``; labels count the sorted classes.

    A video is found as `Files.find` finds it. Raises DataError where ``root`` is missing or videos are not found or not
    unique, with the first of them.
    """
    from vjepa_fast.data.manifests.manifest import Manifest
    from vjepa_fast.data.media import is_image_path

    entries, files = read_list(path), Files(Path(root))
    names = sorted({name for name, _ in entries})
    paths, missing = [], []
    for name, video in entries:
        hit, _ = files.find(video, within=name)
        paths.append(hit)
        if hit is None:
            missing.append(f"{name}/{video}")
    if missing:
        raise DataError(
            f"{path}: {len(missing)} of {len(entries)} videos are not below {root} (or several files have their name): "
            f"{', '.join(missing[:3])}{', ...' if len(missing) > 3 else ''}"
        )
    labels = np.array([names.index(name) for name, _ in entries], dtype=np.int64)
    kind = "image" if 2 * sum(map(is_image_path, paths)) > len(paths) else "video"
    return Manifest(Path(path).stem, str(path), paths, labels, kind), names


def select_part(manifest, split: str, part: str = "test"):
    """The samples of ``manifest`` whose classes are in ``part`` of a published split, with its own labels.

    Class names as `leakage.class_names` reads them, compared without case and spelling.
    Raises DataError where they are unknown, a class of the split is missing or fits two of the manifest's.
    """
    from vjepa_fast.data.manifests.manifest import Manifest

    check_choice("part of a few-shot split", part, PARTS)
    wanted = class_split(split)[part]
    names = class_names(manifest)
    if not names:
        raise DataError(f"{manifest.path}: class names unknown; put a classes.json beside it, one name per label")
    labels = []
    for name in wanted:
        exact = [label for label, own in names.items() if _plain(own) == _plain(name)]
        labels.append(exact or [label for label, own in names.items() if class_keys(own) & class_keys(name)])
    missing = [name for name, hits in zip(wanted, labels) if not hits]
    if missing:
        raise DataError(
            f"{manifest.path}: {len(missing)} of {len(wanted)} classes of {split} {part} are missing: "
            f"{', '.join(missing[:5])}{', ...' if len(missing) > 5 else ''}"
        )
    twice = [n for n, hits in zip(wanted, labels) if len(hits) > 1]
    twice += [names[y] for y, count in Counter(y for hits in labels for y in hits).items() if count > 1]
    if twice:
        raise DataError(f"{manifest.path}: which class is meant is not clear for {', '.join(twice[:5])}")
    keep = np.isin(manifest.labels, [hits[0] for hits in labels])
    paths = [p for p, k in zip(manifest.paths, keep) if k]
    return Manifest(f"{manifest.name}_{split}_{part}", manifest.path, paths, manifest.labels[keep], manifest.kind)


def _plain(name: str) -> str:
    return "".join(c for c in name.lower() if c.isalnum())
