"""Reading lists: lines with their numbers, tables, JSON; and class names to labels."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from vjepa_fast.errors import DataError
from vjepa_fast.files import parse_json
from vjepa_fast.registry import suggestion


def read_text(path: Path) -> str:
    """A list's text, with line feeds alone and no byte order mark. DataError: it cannot be read."""
    try:
        return path.read_bytes().decode("utf-8-sig").replace("\r\n", "\n").replace("\r", "\n")
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: byte {error.start} is not UTF-8 text; save the list as UTF-8") from None
    except OSError as error:
        raise DataError(f"{path}: cannot read the list ({error.strerror})") from None


def read_lines(path: Path) -> Iterator[tuple[str, str]]:
    """(``path:line``, text) of each line that is not blank, without blanks around it.

    Raises:
        DataError: the list cannot be read, or holds nothing.
    """
    lines = [(f"{path}:{i}", line.strip()) for i, line in enumerate(read_text(path).split("\n"), 1) if line.strip()]
    if not lines:
        raise DataError(f"{path}: the list is empty; download it anew")
    yield from lines


def read_table(path: Path, delimiter: str = ",") -> Iterator[tuple[str, list[str]]]:
    """(``path:line``, cells without blanks around them) of each row that is not blank. Errors as `read_lines`."""
    rows = csv.reader(io.StringIO(read_text(path), newline=""), delimiter=delimiter, skipinitialspace=True)
    empty = True
    try:
        for row in rows:
            if any(cell.strip() for cell in row):
                empty = False
                yield f"{path}:{rows.line_num}", [cell.strip() for cell in row]
    except csv.Error as error:
        raise DataError(f"{path}:{rows.line_num}: {error}; quote cells that hold quotes") from None
    if empty:
        raise DataError(f"{path}: the list is empty; download it anew")


def read_json(path: Path, kind: type) -> Any:
    """The content of a JSON file, a dict or list as ``kind`` says. DataError: it cannot be read or is another."""
    try:
        content = parse_json(read_text(path))
    except json.JSONDecodeError as error:
        raise DataError(f"{path}:{error.lineno}: is not JSON ({error.msg}); download it anew") from None
    except RecursionError:
        raise DataError(f"{path}: is nested too deeply to be such a list; download it anew") from None
    if not isinstance(content, kind) or not content:
        raise DataError(f"{path}: expected a JSON {'object' if kind is dict else 'array'} that is not empty")
    return content


def read_names(path: Path) -> list[str]:
    """Class names, a JSON array of different texts. DataError: it is something else."""
    names = read_json(path, list)
    if not all(isinstance(name, str) for name in names) or len(set(names)) < len(names):
        raise DataError(f"{path}: expected a JSON array of different class names, one per label")
    return names


def read_records(path: Path, *keys: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """(``path: entry n``, object) of each entry of a JSON array. DataError: one lacks a key."""
    for number, entry in enumerate(read_json(path, list), 1):
        where = f"{path}: entry {number}"
        missing = [key for key in keys if not isinstance(entry, dict) or key not in entry]
        if missing:
            raise DataError(f"{where}: has no {missing[0]!r}; expected objects with {', '.join(keys)}")
        yield where, entry


def read_pairs(path: Path) -> list[tuple[str, str, str]]:
    """(``path:line``, class, video) of each line of a few-shot list.

    Lines are ``class name/video_id`` (CMN), ``train8/78687`` (TRX) or ``test0//dir/class/file.mp4`` (HyRSM; the
    video is a path). Everything up to the first slash is the class.

    Raises:
        DataError: there is no such file, nothing in it, or a line without a class or a video.
    """
    if not path.is_file():
        raise DataError(f"{path}: no such few-shot list")
    rows = []
    for where, line in read_lines(path):
        name, _, video = (part.strip() for part in line.partition("/"))
        if not name or not video.strip("/"):
            raise DataError(f"{where}: expected '<class>/<video>', found {line[:80]!r}")
        rows.append((where, name, video))
    return rows


class Classes:
    """Class names and their labels.

    Args:
        names: in the order of the labels.
        source: where they are from, for messages.
    """

    def __init__(self, names: Sequence[str], source: object) -> None:
        self.names, self._source = list(names), source
        self._labels = {name: label for label, name in enumerate(self.names)}
        self._folded = {name.casefold(): label for label, name in enumerate(self.names)}

    def label(self, name: str, where: str) -> int:
        """The label of a name, compared exactly and then without case.

        Raises:
            DataError: it is none of the names; says where it stands, and the closest.
        """
        label = self._labels.get(name, self._folded.get(name.casefold()))
        if label is None:
            hint = suggestion(name, self.names)
            raise DataError(f"{where}: class {name!r} is none of the {len(self.names)} of {self._source}{hint}")
        return label


def whole(text: object, where: str, what: str, low: int = 0, high: int = 10**9) -> int:
    """An integer from ``low`` to ``high``. DataError: it is none."""
    try:
        value = int(str(text))
    except ValueError:
        value = low - 1
    if not low <= value <= high:
        raise DataError(f"{where}: {what} is {str(text)[:40]!r}, expected a number from {low} to {high}")
    return value


def order_classes(found: set[str], known: Sequence[str], where: object) -> Classes:
    """The classes that lists name: as evaluation numbers them if it knows all of them, else in the order of names."""
    folded = {name.casefold() for name in known}
    if known and all(name.casefold() in folded for name in found):
        return Classes(known, "the evaluation task")
    return Classes(sorted(found), where)
