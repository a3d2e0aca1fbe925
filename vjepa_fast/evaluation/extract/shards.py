"""Tokens on disk: shards that are written as they come and mapped into memory when rows of them are asked for.

CACHE/<name>-tokens-<24 hex digits of the key>/index.json      key, shapes, shards with their size and sha256
CACHE/<name>-tokens-<...>/00000.safetensors, ...               x [rows, V, N, D], y [rows]
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vjepa_fast import files
from vjepa_fast.errors import CheckpointError, DataError, UserError
from vjepa_fast.evaluation.extract.cache import HINT, file_hash, refuse_other
from vjepa_fast.files import parse_json

SHARD_BYTES = 256 * 2**20
MAX_BAD = 0.05  # share of unreadable samples


@dataclass(frozen=True)
class Shard:
    """Rows ``first`` to ``first + rows`` of a set, in memory (``x`` [rows, V, N, D]) or in a file."""

    first: int
    rows: int
    x: Tensor | None = field(default=None, repr=False)
    path: Path = Path()
    sha256: str = ""
    _checked: list = field(default_factory=list, repr=False, compare=False)  # not empty: the sum was found right

    def read(self, rows: np.ndarray) -> Tensor:
        """Rows (numbers within the shard) as ``[b, V, N, D]``; CheckpointError if the file was changed or is gone."""
        if self.x is not None:
            return self.x[torch.as_tensor(rows)]
        from safetensors import SafetensorError, safe_open

        try:
            if not self._checked:
                if file_hash(self.path) != self.sha256:
                    raise CheckpointError(f"{self.path}: this token cache is damaged; delete its folder")
                self._checked.append(True)
            with safe_open(self.path, "pt") as file:  # maps the file: only the rows asked for are read
                return file.get_tensor("x")[torch.as_tensor(rows)]
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"{self.path}: the token cache cannot be read ({error}); delete its folder") from None


def read_index(folder: Path) -> dict[str, Any] | None:
    """What ``index.json`` holds; None where it is missing or damaged."""
    try:
        index = parse_json((folder / "index.json").read_bytes())
        return index if _is_index(index) and index.get("sha256", _sum(index)) == _sum(index) else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _is_index(index: Any) -> bool:
    """Whether a value has the form of ``index.json``; KeyError or TypeError where it has another."""
    shards = index["shards"]
    return (
        isinstance(index["key"], dict)
        and isinstance(index["complete"], bool)
        and {"grid", "dim"} <= index.keys()
        and all(os.path.basename(shard["file"]) == shard["file"] for shard in shards)
        and all(isinstance(shard["sha256"], str) for shard in shards)
        and all(len(shard["labels"]) == shard["rows"] > 0 and shard["bytes"] > 0 for shard in shards)
        and all(isinstance(shard["until"], int) for shard in shards)
    )


def _sum(index: dict[str, Any]) -> str:
    """SHA-256 (hex) of all but the entry ``sha256``, which indices of before 0.2 do not have."""
    held = {key: value for key, value in index.items() if key != "sha256"}
    return hashlib.sha256(json.dumps(held, sort_keys=True).encode()).hexdigest()


def free_bytes(folder: Path) -> int:
    """Bytes that are free on the disk of a folder, which need not exist yet."""
    while not folder.exists():
        folder = folder.parent
    return shutil.disk_usage(folder).free


def check_memory(name: str, size: int, hint: str) -> None:
    """UserError where tokens of ``size`` bytes do not fit the free memory."""
    free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if size > free:
        raise UserError(f"{name}: its tokens take {size / 1e9:.1f} GB, the free memory has {free / 1e9:.1f} GB; {hint}")


def check_disk(cache_dir: str | os.PathLike, needed: int) -> None:
    """UserError where tokens of ``needed`` bytes, with those that ``cache_dir`` has already, do not fit the disk."""
    folder = Path(cache_dir)
    held = sum(file.stat().st_size for file in folder.glob("*-tokens-*/*.safetensors"))
    free = free_bytes(folder.absolute())
    if needed > held + free:
        raise UserError(
            f"{folder}: all tokens take {needed / 1e9:.1f} GB, of which {held / 1e9:.1f} GB are there; the disk has "
            f"{free / 1e9:.1f} GB free; give a cache folder with more room, or measure fewer encoders or views"
        )


class ShardStore:
    """The shards of a folder, and those to come; in memory without a folder."""

    def __init__(self, folder: Path | None, key: dict, name: str):
        self.folder, self.name = folder, name
        self.index: dict[str, Any] = {"key": key, "shards": [], "grid": None, "dim": None, "complete": False}
        self._memory: list[tuple[Tensor, Tensor]] = []
        self._waiting: list[tuple[Tensor, Tensor]] = []
        if folder is None or (found := read_index(folder)) is None:
            return
        refuse_other(folder, found["key"], key)
        whole = []
        for shard in found["shards"]:  # up to the first that is not as it was written
            path = folder / shard["file"]
            if not path.is_file() or path.stat().st_size != shard["bytes"]:
                break
            whole.append(shard)
        self.index = {**found, "shards": whole, "complete": found["complete"] and len(whole) == len(found["shards"])}

    @property
    def complete(self) -> bool:
        """Whether nothing is left to take."""
        return self.index["complete"]

    @property
    def done(self) -> int:
        """Samples of the source that are dealt with."""
        return self.index["shards"][-1]["until"] if self.index["shards"] else 0

    def add(
        self, x: Tensor, y: Tensor, until: int, grid: Sequence[int], total: int, shard_bytes: int = SHARD_BYTES
    ) -> None:
        """Rows ``x`` [b, V, N, D] with labels; ``until``: samples of the source dealt with so far, of ``total``.

        Raises:
            DataError: the grid or width is another than before.
            UserError: all of them would not fit the disk or the memory, or the folder cannot be written.
        """
        if self.index["dim"] is None:
            self.index.update(grid=list(grid), dim=x.shape[-1], tokens=x.shape[2])
        if (tuple(self.index["grid"]), self.index["dim"]) != (tuple(grid), x.shape[-1]):
            raise DataError(f"{self.name}: the grid changes from {self.index['grid']} to {list(grid)}")
        if not self._memory and not self._waiting and not self.index["shards"]:
            self._check_room(total * x[0].numel() * x.element_size())
        if self.folder is None:
            self._memory.append((x, y))
            return
        self._waiting.append((x, y))
        if sum(part.numel() * part.element_size() for part, _ in self._waiting) >= shard_bytes:
            self._write(self.folder, until)

    def finish(self, total: int) -> None:
        """Write what waits, and mark the store complete. DataError where no sample was read, or over `MAX_BAD` of them
        could not be.
        """
        if self._waiting and self.folder is not None:
            self._write(self.folder, total)
        self.index["complete"] = True
        rows = sum(s["rows"] for s in self.index["shards"]) + sum(len(y) for _, y in self._memory)
        if not rows:
            raise DataError(f"{self.name}: no readable sample to take features of")
        if total - rows > MAX_BAD * total:  # over all parts of an extraction that was stopped
            raise DataError(f"{self.name}: {total - rows} of {total} samples cannot be read, over {MAX_BAD:.0%}")
        if self.folder is not None:
            self._save_index(self.folder)

    def contents(self) -> tuple[np.ndarray, tuple[Shard, ...]]:
        """(labels int64 ``[n]``, shards)."""
        shards, labels, first = [], [], 0
        for part, y in self._memory:
            shards.append(Shard(first, len(y), part))
            labels.append(y.numpy())
            first += len(y)
        for shard in self.index["shards"] if self.folder is not None else ():
            shards.append(Shard(first, shard["rows"], path=self.folder / shard["file"], sha256=shard["sha256"]))
            labels.append(np.asarray(shard["labels"], dtype=np.int64))
            first += shard["rows"]
        return np.concatenate(labels), tuple(shards)

    def _check_room(self, size: int) -> None:
        """UserError where ``size`` bytes do not fit."""
        if self.folder is None:
            check_memory(self.name, size, "give a cache folder, or fewer views")
        elif size > (free := free_bytes(self.folder)):
            raise UserError(
                f"{self.name}: its tokens take {size / 1e9:.1f} GB, the disk of {self.folder} has {free / 1e9:.1f} GB; "
                "take fewer views, or another folder"
            )

    def _write(self, folder: Path, until: int) -> None:
        from safetensors.torch import save

        x, y = torch.cat([x for x, _ in self._waiting]), torch.cat([y for _, y in self._waiting])
        self._waiting = []
        blob = save({"x": x.contiguous(), "y": y.contiguous()})
        file = f"{len(self.index['shards']):05d}.safetensors"
        files.write_bytes(folder / file, blob, HINT)
        shard = {"file": file, "rows": len(y), "until": until, "bytes": len(blob)}
        self.index["shards"].append({**shard, "sha256": hashlib.sha256(blob).hexdigest(), "labels": y.tolist()})
        self._save_index(folder)

    def _save_index(self, folder: Path) -> None:
        self.index["sha256"] = _sum(self.index)
        files.write_text(folder / "index.json", json.dumps(self.index), HINT)
