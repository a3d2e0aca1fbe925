"""From folders to manifests. Needs no torch."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TypedDict

import numpy as np

from vjepa_fast.data.manifests.manifest import quoted
from vjepa_fast.data.media import IMAGE_SUFFIXES, VIDEO_SUFFIXES, is_image_path
from vjepa_fast.errors import DataError
from vjepa_fast.files import write_bytes, write_json

SPLITS = ("train", "val", "test")
Row = tuple[Path, int]  # file and label


class Written(TypedDict):
    """One manifest that was written: its path, and the numbers of its samples and of the classes among them."""

    path: str
    samples: int
    classes: int


def scan_folder(
    folder: str | os.PathLike[str],
    *,
    out: str | os.PathLike[str] | None = None,
    val_fraction: float = 0.0,
    test_fraction: float = 0.0,
    absolute: bool = False,
    seed: int = 0,
) -> dict[str, Written]:
    """Write manifests for a folder of class folders.

    ``FOLDER/<class>/<file>`` gives one manifest, of which ``val_fraction`` and ``test_fraction`` of every class may be
    split off at random, with all clips that were cut from one video (`group_of`) in one part.
    ``FOLDER/train/<class>/<file>`` (and val, test) gives one manifest per part. Files directly in FOLDER give one
    manifest with label 0. Classes are numbered in the order of their names, over all parts. Hidden files and folders,
    and what macOS adds to archives, are left out.

    Args:
        folder: to look through.
        out: the (training) manifest; default FOLDER/train.csv. Other parts go beside it as ``val.csv``, ``test.csv``,
            or ``<stem>_val.csv`` when ``out`` is given; class names as ``classes.json`` or ``<stem>_classes.json``.
        val_fraction, test_fraction: share of every class that goes to ``val`` and ``test``.
        absolute: write absolute paths; otherwise relative to the manifest.
        seed: of the split.

    Returns:
        Part (train, val, test) -> what was written.

    Raises:
        DataError: no such folder, no video or image in it, or videos and images in one part.
        UserError: a manifest cannot be written.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise DataError(f"{folder}: no such folder")
    if val_fraction < 0 or test_fraction < 0 or val_fraction + test_fraction >= 1:
        raise DataError(
            f"fractions {val_fraction:g} (val) and {test_fraction:g} (test) must not be negative "
            "and leave something to train on"
        )
    split_folders = [s for s in SPLITS if (folder / s).is_dir() and any(p.is_dir() for p in (folder / s).iterdir())]
    if split_folders and (val_fraction or test_fraction):
        raise DataError(f"{folder}: has folders {', '.join(split_folders)} already; leave the fractions out")
    found = {s: _classes(folder / s) for s in split_folders} or {"train": _classes(folder)}
    names = sorted(set().union(*found.values()))
    if not names:
        raise DataError(
            f"{folder}: no video or image in it or its class folders "
            f"(looked for {' '.join(sorted(VIDEO_SUFFIXES | IMAGE_SUFFIXES))})"
        )
    parts = {
        s: [(p, names.index(c)) for c, files in sorted(classes.items()) for p in files] for s, classes in found.items()
    }
    if not split_folders:
        parts = _split(parts["train"], val_fraction, test_fraction, seed)
    target = Path(out) if out is not None else folder / "train.csv"
    hint = "choose another place with --out"
    written: dict[str, Written] = {}
    for part, rows in parts.items():
        images = sum(is_image_path(str(path)) for path, _ in rows)
        if images not in (0, len(rows)):
            raise DataError(
                f"{folder}: {part} holds {len(rows) - images} videos and {images} images; "
                "put them in folders of their own and mix the two manifests by weight"
            )
        beside = target.with_name(f"{part}.csv" if out is None else f"{target.stem}_{part}{target.suffix}")
        path = target if part == "train" else beside
        lines = [f"{quoted(_name(p, path, absolute))} {label}\n" for p, label in rows]
        write_bytes(path, "".join(lines).encode(errors="surrogateescape"), hint)
        written[part] = {"path": str(path), "samples": len(rows), "classes": len({label for _, label in rows})}
    names_path = target.with_name(f"{target.stem}_classes.json" if out is not None else "classes.json")
    write_json(names_path, names, hint)
    return written


def _classes(folder: Path) -> dict[str, list[Path]]:
    """Class -> its files, sorted; files in folders below a class folder belong to it."""

    def media(paths: Iterable[Path]) -> list[Path]:
        seen = (p for p in paths if not any(map(_hidden, p.relative_to(folder).parts)))
        return sorted(p for p in seen if p.suffix.lower() in VIDEO_SUFFIXES | IMAGE_SUFFIXES and p.is_file())

    classes = {d.name: media(d.rglob("*")) for d in sorted(folder.iterdir()) if d.is_dir() and not _hidden(d.name)}
    classes = {name: files for name, files in classes.items() if files}
    return classes or ({folder.name: loose} if (loose := media(folder.iterdir())) else {})


def _hidden(name: str) -> bool:
    return name.startswith(".") or name == "__MACOSX"


def group_of(path: Path) -> str:
    """What a clip was cut from, by its name.

    The group of UCF-101 (``v_Archery_g01_c02``), the video of Kinetics (eleven characters, ``_000010_000020``), else
    the file itself.
    """
    if found := re.fullmatch(r"(v_.+_g[0-9]+)_c[0-9]+", path.stem) or re.fullmatch(
        r"(.{11})_[0-9]{6}_[0-9]{6}", path.stem
    ):
        return found[1]
    return str(path)


def _split(rows: Sequence[Row], val_fraction: float, test_fraction: float, seed: int) -> dict[str, list[Row]]:
    parts: dict[str, list[Row]] = {"train": [], "val": [], "test": []}
    labels = np.array([label for _, label in rows])
    for label in np.unique(labels):
        members = np.nonzero(labels == label)[0]
        groups: dict[str, list[int]] = {}
        for i in members.tolist():
            groups.setdefault(group_of(rows[i][0]), []).append(i)
        mixed = np.random.default_rng([seed, int(label)]).permutation([group[0] for group in groups.values()])
        waiting = [groups[group_of(rows[i][0])] for i in mixed]
        for part, share in (("val", val_fraction), ("test", test_fraction)):
            chosen: list[int] = []
            while len(chosen) < round(share * len(members)) and len(waiting) > (len(groups) < len(members)):
                chosen += waiting.pop(0)  # where clips have groups, one group stays to train on
            parts[part] += [rows[i] for i in sorted(chosen)]
        parts["train"] += [rows[i] for i in sorted(i for group in waiting for i in group)]
    return {part: rows for part, rows in parts.items() if rows}


def _name(path: Path, manifest: Path, absolute: bool) -> str:
    full = os.path.abspath(path)
    try:
        name = full if absolute else os.path.relpath(full, os.path.abspath(manifest.parent))
    except ValueError:  # on another drive
        name = full
    if "\n" in name or "\r" in name:
        raise DataError(f"{name!r}: a path with a line break cannot be in a manifest; rename it")
    return name
