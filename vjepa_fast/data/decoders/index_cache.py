"""Frame indices that are kept: in memory, and in a file beside each manifest, so that reading pays for them once.

The file ``<manifest>.frames`` (of train.csv: train.frames) is written by ``vjepa-fast data check``. An index counts for
one path, size and modification time; of a file that has changed since, it is made anew.
"""

from __future__ import annotations

import hashlib
import os
import threading
from collections import OrderedDict
from contextlib import suppress
from pathlib import Path
from typing import Generic, TypeVar

import numpy as np

from vjepa_fast.data.decoders.index import FrameIndex
from vjepa_fast.data.decoders.scan import scan
from vjepa_fast.data.media import ReadOptions, check_file
from vjepa_fast.data.members import stat_of as _stamp
from vjepa_fast.files import atomic_file, check_stored

_PACKED = 128_000_000  # bytes of packed indices in memory; one of 300 frames takes some 300
_READY = 2_000_000  # frames in unpacked indices, of some 30 bytes each


class IndexCache:
    """Indices by path. Safe to use from several threads; a process of its own has a cache of its own."""

    def __init__(self) -> None:
        self._packed: _Recent[bytes] = _Recent(_PACKED)
        self._ready: _Recent[FrameIndex] = _Recent(_READY)
        self._beside: dict[Path, _Stored | None] = {}  # not read yet: None
        self._lock = threading.Lock()
        if hasattr(os, "register_at_fork"):  # not on Windows
            os.register_at_fork(after_in_child=self._forked)

    def _forked(self) -> None:
        self._lock = threading.Lock()  # another thread of the parent may have held it

    def get(self, path: str, options: ReadOptions) -> FrameIndex:
        """The index of a file, made if there is none. Errors as `scan`."""
        check_file(path)
        index = self.known(path)
        if index is None:
            stamp = _stamp(path)
            index = scan(path, options)
            self._keep(path, stamp, index)
        return index

    def known(self, path: str) -> FrameIndex | None:
        """The index of a file if it was made before, and the file is the same."""
        try:
            stamp = _stamp(path)
        except OSError:  # the file is gone
            return None
        with self._lock:
            if (index := self._ready.get(path, stamp)) is not None:
                return index
            packed = self._find(path, stamp)
        if packed is None:
            return None
        try:
            index = FrameIndex.unpack(packed)
        except ValueError:  # of another version
            return None
        with self._lock:
            self._ready.put(path, stamp, index, index.frames)
        return index

    def put(self, path: str, index: FrameIndex) -> None:
        """Keep an index that another process made."""
        self._keep(path, _stamp(path), index)

    def correct(self, path: str, options: ReadOptions) -> FrameIndex:
        """The index by decoding all frames; kept in place of the one from the packets, but for a damaged file."""
        stamp = _stamp(path)
        index = scan(path, options, decode=True)
        if not index.damaged:
            self._keep(path, stamp, index)
        return index

    def use(self, manifest: str | os.PathLike[str]) -> None:
        """Look into the file beside this manifest too, if there is one."""
        file = Path(os.path.abspath(manifest)).with_suffix(".frames")
        if file.exists():
            with self._lock:
                self._beside.setdefault(file, None)

    def save(self, manifest: str | os.PathLike[str], paths: list[str]) -> Path:
        """Write the indices of these files, as far as they are known, beside the manifest.

        Raises:
            UserError: the file cannot be written.
        """
        file = Path(os.path.abspath(manifest)).with_suffix(".frames")
        rows = {}
        for path in paths:
            with suppress(OSError):
                stamp = _stamp(path)
                with self._lock:
                    if packed := self._find(path, stamp):
                        rows[_key(file.parent, path, stamp)] = packed
        _Stored.write(file, rows)
        with self._lock:
            self._beside[file] = None
        return file

    def _find(self, path: str, stamp: tuple[int, int]) -> bytes | None:
        if packed := self._packed.get(path, stamp):
            return packed
        for file, stored in self._beside.items():
            if stored is None:
                stored = self._beside[file] = _Stored(file)
            if packed := stored.get(_key(file.parent, path, stamp)):
                return packed
        return None

    def _keep(self, path: str, stamp: tuple[int, int], index: FrameIndex) -> None:
        packed = index.pack()
        with self._lock:
            self._packed.put(path, stamp, packed, len(packed))
            self._ready.put(path, stamp, index, index.frames)


T = TypeVar("T")


class _Recent(Generic[T]):
    """Values of files, those used last; together not larger than ``room``, but for a single one."""

    def __init__(self, room: int) -> None:
        self._room, self._used = room, 0
        self._kept: OrderedDict[str, tuple[tuple[int, int], T, int]] = OrderedDict()  # path -> stamp, value, its size

    def get(self, path: str, stamp: tuple[int, int]) -> T | None:
        kept = self._kept.get(path)
        if kept is None or kept[0] != stamp:
            return None
        self._kept.move_to_end(path)
        return kept[1]

    def put(self, path: str, stamp: tuple[int, int], value: T, size: int) -> None:
        if path in self._kept:
            self._used -= self._kept.pop(path)[2]
        self._kept[path] = (stamp, value, size)
        self._used += size
        while self._used > self._room and len(self._kept) > 1:
            self._used -= self._kept.popitem(last=False)[1][2]


class _Stored:
    """What one file holds: sorted keys, and where each one's index begins in the bytes after one another."""

    def __init__(self, file: Path) -> None:
        self.key, self.begin = np.zeros(0, np.uint64), np.zeros(1, np.int64)
        self.data = np.zeros(0, np.uint8)
        try:
            check_stored(file)
            with np.load(file, allow_pickle=False) as columns:
                key, begin, data = columns["key"], columns["begin"], columns["data"]
        except Exception:  # missing or damaged in whichever way: the indices are made anew
            return
        if len(begin) == len(key) + 1 and begin[-1] == len(data):
            self.key, self.begin, self.data = key, begin, data

    def get(self, key: int) -> bytes | None:
        at = int(np.searchsorted(self.key, np.uint64(key)))
        if at == len(self.key) or int(self.key[at]) != key:
            return None
        return self.data[self.begin[at] : self.begin[at + 1]].tobytes()

    @staticmethod
    def write(file: Path, rows: dict[int, bytes]) -> None:
        keys = sorted(rows)
        sizes = [len(rows[key]) for key in keys]
        with atomic_file(file, "wb", "the next run reads the films' packets again") as f:
            np.savez(
                f,
                key=np.array(keys, np.uint64),
                begin=np.concatenate([[0], np.cumsum(sizes, dtype=np.int64)]).astype(np.int64),
                data=np.frombuffer(b"".join(rows[key] for key in keys), np.uint8),
            )


def _key(folder: Path, path: str, stamp: tuple[int, int]) -> int:
    """Of a file's path from that folder on, so that both can move together, and of its size and time."""
    text = f"{os.path.relpath(path, folder)}\0{stamp[0]}\0{stamp[1]}".encode(errors="surrogateescape")
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little")


INDICES = IndexCache()


def index_of(path: str | os.PathLike[str], options: ReadOptions | None = None) -> FrameIndex:
    """The frame index of a video, kept from then on.

    Raises:
        DataError: the file is missing, empty or damaged, is no video, or is over a limit of ``options``.
    """
    return INDICES.get(os.fspath(path), options or ReadOptions())
