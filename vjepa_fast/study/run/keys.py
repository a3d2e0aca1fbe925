"""What a folder was made for, noted in the folder, so that one of another plan is not taken for a stopped one."""

from __future__ import annotations

import json
import os
from pathlib import Path

from vjepa_fast.files import write_json

_FILE = "demo_key.json"


def has_key(folder: str | os.PathLike, key: str | None = None) -> bool:
    """Whether a folder has the note of ``key`` (None: any note)."""
    mark = Path(folder) / _FILE
    return mark.is_file() and (key is None or json.loads(mark.read_text()) == key)


def leave_key(folder: str | os.PathLike, key: str | None) -> None:
    """Leave the note in a folder that has none; None takes it away."""
    mark = Path(folder) / _FILE
    if key is None:
        mark.unlink(missing_ok=True)
    elif not mark.is_file():
        write_json(mark, key)
