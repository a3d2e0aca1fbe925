"""A table of paths and labels."""

from __future__ import annotations

from pathlib import Path

from vjepa_fast.data.prepare.api import DATA_SETS, DataSet, Listed, Listing, Request
from vjepa_fast.data.prepare.find import Files
from vjepa_fast.data.prepare.lists import Classes, order_classes, read_names, read_table, read_text, whole
from vjepa_fast.errors import DataError

_PATH = ("path", "file", "filename", "file_name", "video", "video_path", "image", "image_path", "name")
_LABEL = ("label", "class", "class_name", "target", "category", "label_name")
_PARTS = ("train", "val", "test")


@DATA_SETS.register("csv")
class Table(DataSet):
    """Your own tables: path and label (a number or a class), with a comma, tab or semicolon between."""

    title = "CSV"
    unpacked = "one table, or train.csv, val.csv and test.csv; files beside it or below SOURCE"

    def read(self, request: Request) -> Listing:
        """One part per table; classes.json beside it or the order of their names numbers classes given by name."""
        lists = request.lists or request.source
        if lists.is_dir():
            tables = {part: lists / f"{part}.csv" for part in _PARTS if (lists / f"{part}.csv").is_file()}
        else:
            tables = {lists.stem: lists}
        if not tables:
            raise DataError(f"{lists}: holds no train.csv, val.csv or test.csv; name the table itself")
        files = Files(request.source if request.source.is_dir() else request.source.parent)
        rows = {part: list(_rows(path)) for part, path in tables.items()}
        labels = {label for part in rows.values() for _, _, label in part}
        numbers = {label for label in labels if label.isdecimal()}
        beside = next(iter(tables.values())).with_name("classes.json")
        if not beside.is_file() and numbers and numbers != labels:
            where, label = next((w, t) for part in rows.values() for w, _, t in part if t not in numbers)
            raise DataError(f"{where}: the label {label!r} is no number, others are; give all as numbers, or as names")
        if numbers == labels:
            count = max(whole(label, str(lists), "a label", 0, 10**6) for label in labels) + 1
            names = read_names(beside) if beside.is_file() else [str(number) for number in range(count)]
            if len(names) < count:
                raise DataError(f"{beside}: {len(names)} class names, but the table has label {count - 1}")
            numbered = {label: int(label) for label in labels}
            classes = Classes(names, lists)
        else:
            classes = Classes(read_names(beside), beside) if beside.is_file() else order_classes(labels, (), lists)
            numbered = None
        parts = {}
        for part, found in rows.items():
            parts[part] = []
            for where, path, label in found:
                number = numbered[label] if numbered else classes.label(label, where)
                parts[part].append(Listed(path, number, where, *_find(files, path)))
        return Listing(parts, classes.names)


def _find(files: Files, name: str) -> tuple[str | None, str]:
    direct = files.root / name
    return (str(direct.absolute()), "") if direct.is_file() else files.find(name)


def _rows(path: Path) -> list[tuple[str, str, str]]:
    """(where, path, label) of each row."""
    first = next((line for line in read_text(path).split("\n") if line.strip()), "")
    delimiter = next((d for d in "\t;," if d in first), None)
    if delimiter is None:
        raise DataError(
            f"{path}:1: expected a path and a label with a comma, tab or semicolon between, found {first[:80]!r}"
        )
    rows = list(read_table(path, delimiter))
    head = [cell.lower() for cell in rows[0][1]]
    at, of = (next((head.index(n) for n in names if n in head), None) for names in (_PATH, _LABEL))
    if at is not None and of is not None:
        rows = rows[1:]
    elif len(head) == 2:
        at, of = 0, 1
        rest = [cells[1] for _, cells in rows[1:] if len(cells) == 2]
        if rest and not head[1].isdecimal() and all(label.isdecimal() for label in rest):
            rows = rows[1:]  # a head of other words
    else:
        raise DataError(
            f"{rows[0][0]}: {len(head)} columns, which are path and label is not clear; name them in a first line"
        )
    if not rows:
        raise DataError(f"{path}: the table has a head and no rows")
    found = []
    for where, cells in rows:
        if len(cells) != len(head):
            raise DataError(f"{where}: has {len(cells)} columns, the first line {len(head)}; quote paths with commas")
        if not cells[at] or not cells[of]:
            raise DataError(f"{where}: the {'label' if cells[at] else 'path'} is empty")
        found.append((where, cells[at], cells[of]))
    return found
