"""Kinetics-400: annotation CSVs, and files <youtube id>_<start>_<end>.mp4 with their replacements."""

from __future__ import annotations

import os
from pathlib import Path

from vjepa_fast.data.prepare.api import DATA_SETS, DataSet, Listed, Listing, Request
from vjepa_fast.data.prepare.find import Files
from vjepa_fast.data.prepare.lists import order_classes, read_table, whole
from vjepa_fast.errors import DataError

_HINT = "download train.csv, val.csv and test.csv there, or name their folder with --lists"
_PARTS = {"train": "train", "val": "val", "validate": "val", "validation": "val", "test": "test"}
_COLUMNS = ("youtube_id", "time_start", "time_end", "split")


@DATA_SETS.register("kinetics400")
class Kinetics400(DataSet):
    """Kinetics-400: CSVs of label, youtube_id, time_start, time_end, split; <id>_<start>_<end>.mp4."""

    title = "Kinetics-400"
    unpacked = "train/, val/, test/, replacement/ and annotations/"
    task = "k400"

    def read(self, request: Request) -> Listing:
        """Parts train, val and test, those whose CSV is there and has labels; classes by name."""
        rows: list[tuple[str, str, str, str]] = []  # part, class, video, where
        notes = []
        tables = [path for name, paths in request.list_files(_HINT).items() if name.endswith(".csv") for path in paths]
        for path in sorted(tables):
            table = read_table(path)
            first, head = next(table)
            columns = {name.lower(): i for i, name in enumerate(head)}
            if "youtube_id" not in columns:
                continue
            missing = [name for name in _COLUMNS if name not in columns]
            if missing:
                raise DataError(f"{first}: has no column {missing[0]}; {_HINT}")
            if "label" not in columns:
                notes.append(f"{path} has no labels and is left out")
                continue
            rows += [_row(columns, cells, where) for where, cells in table]
        if not rows:
            raise DataError(f"{request.lists or request.source}: holds no CSV with the column youtube_id; {_HINT}")
        classes = order_classes({name for _, name, _, _ in rows}, request.known, "the CSVs")
        parts: dict[str, list[Listed]] = {part: [] for part in dict.fromkeys(_PARTS.values())}
        replaced = 0
        for part, name, video, where in rows:
            path, problem = _find(request.files, video, part)
            replaced += path is not None and _is_replacement(path)
            parts[part].append(Listed(video, classes.label(name, where), where, path, problem))
        if replaced:
            notes.append(f"{replaced} files are read from the replacement folder")
        return Listing({part: listed for part, listed in parts.items() if listed}, classes.names, notes)


def _row(columns: dict[str, int], cells: list[str], where: str) -> tuple[str, str, str, str]:
    if len(cells) <= max(columns.values()):
        raise DataError(f"{where}: has {len(cells)} columns, fewer than the first line; download the CSV anew")
    split = cells[columns["split"]].lower()
    if split not in _PARTS:
        raise DataError(f"{where}: split {split!r} is none of {', '.join(_PARTS)}")
    start = whole(cells[columns["time_start"]].removesuffix(".0"), where, "time_start", 0, 999_999)
    end = whole(cells[columns["time_end"]].removesuffix(".0"), where, "time_end", 0, 999_999)
    name = cells[columns["label"]].strip("\"'")
    return _PARTS[split], name, f"{cells[columns['youtube_id']]}_{start:06d}_{end:06d}", where


def _find(files: Files, video: str, part: str) -> tuple[str | None, str]:
    """The replacement of a damaged file goes first."""
    for path in files.media.get(f"{video}.mp4", []):
        if _is_replacement(path):
            return path, ""
    return files.find(video, within=part)


def _is_replacement(path: str) -> bool:
    return any(folder.startswith("replacement") for folder in Path(os.path.dirname(path)).parts)
