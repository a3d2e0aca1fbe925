"""Finding the files that a list names."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path

from vjepa_fast.data.media import IMAGE_SUFFIXES, VIDEO_SUFFIXES, suffix_of
from vjepa_fast.errors import DataError

MEDIA_SUFFIXES = VIDEO_SUFFIXES | IMAGE_SUFFIXES
_TIMED = re.compile(r"([\w-]{11})_\d{6}_\d{6}")  # Kinetics: YouTube id, start and end in seconds
_LIST_SUFFIXES = frozenset({".txt", ".csv", ".tsv", ".json", ".list"})


def visible(folder: str | os.PathLike[str]) -> Iterator[str]:
    """Paths of the files below a folder, sorted; hidden ones, those of macOS archives and half-written ones left out.

    Links are followed; a folder that contains itself by a link is gone through once.
    """
    seen: set[tuple[int, int]] = set()
    for here, folders, files in os.walk(folder, followlinks=True):
        stat = os.stat(here)
        if (stat.st_dev, stat.st_ino) in seen:
            folders.clear()
            continue
        seen.add((stat.st_dev, stat.st_ino))
        folders[:] = sorted(f for f in folders if not f.startswith(".") and f != "__MACOSX")
        yield from (os.path.join(here, f) for f in sorted(files) if not f.startswith(".") and not f.endswith(".tmp"))


class Files:
    """The files below a folder, looked up by what lists call them.

    Attributes:
        root: the folder.
        lists: files that can be lists, by name. media: videos and images, by name.

    Raises:
        DataError: there is no such folder.
    """

    def __init__(self, root: Path) -> None:
        if not root.is_dir():
            raise DataError(f"{root}: no such folder; name the one that the download was unpacked to")
        self.root = root
        self.lists: dict[str, list[Path]] = {}
        self.media: dict[str, list[str]] = {}
        self._stems: dict[str, list[str]] = {}
        self._ids: dict[str, list[str]] = {}
        self._folders: set[str] = set()  # names of those that hold media, at any depth
        known = ""
        for path in visible(os.path.abspath(root)):
            name, suffix = os.path.basename(path), suffix_of(path)
            if suffix in _LIST_SUFFIXES:
                self.lists.setdefault(name, []).append(Path(path))
            elif suffix in MEDIA_SUFFIXES:
                self.media.setdefault(name, []).append(path)
                if os.path.dirname(path) != known:
                    known = os.path.dirname(path)
                    self._folders |= self._above(path)
                stem = name[: -len(suffix)]
                self._stems.setdefault(stem, []).append(path)
                if match := _TIMED.fullmatch(stem):
                    self._ids.setdefault(match[1], []).append(path)

    def find(self, name: str, within: str = "") -> tuple[str | None, str]:
        """The file that a list calls ``name``, or (None, why there is none).

        ``name`` is a path or a part of one, with or without suffix; a Kinetics clip is also found by its YouTube id. Of
        several files with its last part the one is meant that has most of its folders, or is in a folder ``within``;
        a single one elsewhere, where there is a folder of that name, is not.
        """
        if os.path.isabs(name) and os.path.isfile(name):
            return name, ""
        parts = name.replace("\\", "/").strip("/").split("/")
        if not parts[-1]:
            return None, "the list gives no name"
        hits, folders = self._named(parts[-1]), parts[:-1]
        if len(hits) > 1:
            ways = [folders, [within]] if within else [folders]
            shares = [max(_shared(hit, way) for way in ways) for hit in hits]
            hits = [hit for hit, share in zip(hits, shares) if share == max(shares)]
        if not hits:
            return None, f"not below {self.root}"
        if len(hits) > 1:
            return None, f"{len(hits)} files have this name: {hits[0]}, {hits[1]}"
        wanted = {_plain(folder) for folder in (*folders[-1:], *([within] if within else []))} & self._folders
        if wanted and not wanted & self._above(hits[0]):
            return None, f"not in {folders[-1] if folders else within}; a file of this name is {hits[0]}"
        return hits[0], ""

    def _above(self, path: str) -> set[str]:
        """Names of the folders below the root that a file is in."""
        below = os.path.relpath(os.path.dirname(path), os.path.abspath(self.root))
        return {_plain(folder) for folder in below.split(os.sep)}

    def _named(self, last: str) -> list[str]:
        suffix = suffix_of(last)
        stem = last[: -len(suffix)] if suffix in MEDIA_SUFFIXES else last
        match = _TIMED.fullmatch(stem)
        other = self._stems.get(match[1]) if match else self._ids.get(stem)
        return self.media.get(last) or self._stems.get(last) or self._stems.get(stem) or other or []


def _shared(path: str, folders: list[str]) -> int:
    """Number of folders at the end of both that are equal, blanks and underscores being the same."""
    count = 0
    for a, b in zip(reversed(os.path.dirname(path).split(os.sep)), reversed(folders)):
        if _plain(a) != _plain(b):
            break
        count += 1
    return count


def _plain(name: str) -> str:
    return name.replace("_", " ").casefold()
