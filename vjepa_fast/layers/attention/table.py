"""What ``runtime.attention: auto`` has measured, kept on disk: ``attention.json`` in the cache folder of this package.

One table for each environment (device, versions of torch, Triton and all backends): a row for each shape, with the
backend that was taken and the milliseconds of all that were timed.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vjepa_fast.errors import UserError
from vjepa_fast.files import first_line, parse_json, write_json

_log = logging.getLogger("vjepa_fast")
_FORMAT = "vjepa-fast attention 1"

Row = dict[str, Any]  # backend: its name; ms: {name: milliseconds, None where it failed}


def path() -> Path:
    """``$XDG_CACHE_HOME/vjepa_fast/attention.json``, by default in ``~/.cache``."""
    folder = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    return Path(folder) / "vjepa_fast" / "attention.json"


class Table:
    """Rows by environment and shape. The file is read when first asked, and written as a whole after a measurement."""

    def __init__(self) -> None:
        self._rows: dict[str, dict[str, Row]] | None = None
        self._told: set[str] = set()

    def rows(self, environment: str) -> Mapping[str, Row]:
        """Shape -> row."""
        return self.environments().get(environment, {})

    def environments(self) -> Mapping[str, Mapping[str, Row]]:
        """Environment -> shape -> row."""
        if self._rows is None:
            self._rows = self._read()
        return self._rows

    def add(self, environment: str, shape: str, row: Row) -> None:
        """Keep a row, beside those that other processes have written meanwhile."""
        own, disk = self._rows or {}, self._read()
        self._rows = {name: {**disk.get(name, {}), **own.get(name, {})} for name in {**disk, **own}}
        self._rows.setdefault(environment, {})[shape] = row
        try:
            write_json(path(), {"format": _FORMAT, "environments": self._rows})
        except UserError as error:  # a home that is read-only: the process still knows
            self._tell(f"attention backends are measured anew in every process: {error}")

    def _read(self) -> dict[str, dict[str, Row]]:
        try:
            found = parse_json(path().read_text(encoding="utf-8"))
            rows = found["environments"]
            if found["format"] != _FORMAT or not all(_fits(row) for table in rows.values() for row in table.values()):
                raise ValueError("it is of another format")
            return rows
        except FileNotFoundError:
            return {}
        except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
            why = first_line(error) if isinstance(error, OSError | ValueError) else "it is of another format"
            self._tell(f"{path()}: not a table of attention backends ({why}); they are measured anew")
            return {}

    def _tell(self, text: str) -> None:
        if text not in self._told:
            self._told.add(text)
            _log.warning("%s", text)


def _fits(row: object) -> bool:
    return isinstance(row, dict) and isinstance(row.get("backend"), str) and isinstance(row.get("ms"), dict)
