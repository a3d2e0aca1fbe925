"""Manifests: one CSV per dataset, a line ``<path> <label>`` per sample, as the FAIR code reads them."""

from __future__ import annotations

import hashlib
import os
import re
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import numpy as np

from vjepa_fast.data.decoders.index_cache import INDICES
from vjepa_fast.data.media import is_image_path
from vjepa_fast.errors import DataError

_NUMBER = re.compile(r"-?[0-9]{1,4000}")
_LARGEST_LABEL = 2**31 - 1


@dataclass(frozen=True, eq=False)
class Manifest:
    """Samples of one dataset.

    Attributes:
        name: the file's name without suffix. path: the file.
        paths: one file per sample, resolved. labels: int64 ``[n]``.
        kind: "video" or "image", whichever most samples are by their suffix.
    """

    name: str
    path: str
    paths: list[str] = field(repr=False)
    labels: np.ndarray = field(repr=False)
    kind: str

    def __len__(self) -> int:
        return len(self.paths)

    @cached_property
    def hash(self) -> str:
        """Changes with the list, the labels, and the size or time of any file."""
        digest = hashlib.sha256()
        for path, label in zip(self.paths, self.labels, strict=True):
            try:
                stat = os.stat(path)
                state = f"{stat.st_size} {stat.st_mtime_ns}"
            except OSError:
                state = "missing"
            digest.update(f"{path}\0{label}\0{state}\n".encode())
        return digest.hexdigest()


def load_manifest(path: str | os.PathLike[str]) -> Manifest:
    """Read a manifest.

    Lines are ``<path> <label>``; ``::``, a tab or a comma separate as well, paths may hold blanks, and quotes around
    a path are taken off. Relative paths are relative to the manifest's folder; if the first one is not there, to the
    working directory.

    Raises:
        DataError: missing or empty file, or a line that is not a path and a non-negative integer.
    """
    file = Path(path)
    if file.is_dir():
        raise DataError(f"{file}: is a folder, not a manifest; make one with: vjepa-fast data manifest {file}")
    try:
        lines = file.read_text(encoding="utf-8-sig").splitlines()
    except FileNotFoundError:
        raise DataError(f"{file}: no such manifest; make one with: vjepa-fast data manifest FOLDER") from None
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is not text"
        raise DataError(f"{file}: cannot read the manifest ({reason})") from None
    paths, labels = [], []
    for number, line in enumerate(lines, start=1):
        if line.strip():
            sample, label = _parse(line.strip(), f"{file}:{number}")
            paths.append(sample)
            labels.append(label)
    if not paths:
        raise DataError(f"{file}: the manifest is empty; it needs one '<path> <label>' line per sample")
    base = _base(file, paths[0])
    paths = [p if os.path.isabs(p) else os.path.join(base, p) for p in paths]
    images = sum(map(is_image_path, paths))
    kind = "image" if 2 * images > len(paths) else "video"
    if kind == "video":
        INDICES.use(file)
    return Manifest(file.stem, str(file), paths, np.asarray(labels, np.int64), kind)


def _parse(line: str, where: str) -> tuple[str, int]:
    if "\0" in line:
        raise DataError(f"{where}: holds a zero byte; save the manifest as UTF-8 text")
    for separator in ("::", None, ","):
        parts = line.rsplit(separator, 1)
        if len(parts) == 2 and _NUMBER.fullmatch(parts[1].strip()):
            label = int(parts[1])
            if label > _LARGEST_LABEL:
                raise DataError(f"{where}: label {label} is too large; labels count from 0")
            if label < 0:
                raise DataError(f"{where}: label {label} is negative; labels count from 0")
            return parts[0].strip().strip('"'), label
    raise DataError(f"{where}: expected '<path> <label>' with an integer label, found {line[:80]!r}")


def _base(file: Path, first: str) -> str:
    folder = os.path.abspath(file.parent)
    if not os.path.isabs(first) and not os.path.exists(os.path.join(folder, first)) and os.path.exists(first):
        return os.getcwd()
    return folder
