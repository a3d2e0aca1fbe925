"""What a file of weights may ask of whoever reads it: no more memory and time than a file of its size can need."""

from __future__ import annotations

import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from vjepa_fast.files import check_stored
from vjepa_fast.models.digests import DamagedError

DEEPEST = 64  # dictionaries and lists in one another
MOST = 500_000  # values
SHARED = 8  # times the file that its tensors may be together: some share memory, or repeat it
SMALL = 64_000_000  # bytes that they may be of any file


def check_file(path: Path) -> None:
    """Look at the directory of a checkpoint that is a zip file, before anything of it is read.

    Raises:
        DamagedError: entries are compressed or larger than the file: such a file unpacks to any size.
    """
    try:
        check_stored(path)
    except zipfile.BadZipFile as error:
        raise DamagedError(f"{path}: cannot be read (damaged, or not a weights file): {error}") from None


def check_content(content: Any, path: Path) -> None:
    """Look at what a checkpoint holds, before anything is done with it.

    Raises:
        DamagedError: too deeply nested, too many values, or tensors that stand for more numbers than the file has room
            for (a view that repeats one number, for example); names the place.
    """
    room = max(SMALL, SHARED * path.stat().st_size)
    todo: list[tuple[str, int, Any]] = [("", 0, content)]
    values = total = 0
    while todo:
        place, depth, value = todo.pop()
        values += 1
        if values > MOST:
            raise DamagedError(f"{path}: holds more than {MOST} values, too many for a checkpoint")
        if depth > DEEPEST:
            raise DamagedError(f"{path}: {place[:80]}: more than {DEEPEST} dictionaries and lists in one another")
        if isinstance(value, Mapping):
            todo += [(f"{place}/{str(key)[:60]}".lstrip("/"), depth + 1, item) for key, item in value.items()]
        elif isinstance(value, (list, tuple, set)):
            todo += [(place, depth + 1, item) for item in value]
        elif isinstance(value, Tensor) and not value.is_meta:
            total += value.numel() * value.element_size()
            if total > room:
                raise DamagedError(
                    f"{path}: {place}: with it the tensors take {total} bytes, more than a file of "
                    f"{path.stat().st_size} bytes can hold (at most {SHARED} times as many are read)"
                )
