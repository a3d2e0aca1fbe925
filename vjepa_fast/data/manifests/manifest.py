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
from vjepa_fast.data.manifests.root import Root
from vjepa_fast.data.manifests.shards import lists_shards, read_shards
from vjepa_fast.data.media import IMAGE_SUFFIXES, VIDEO_SUFFIXES, is_image_path, one_line, suffix_of
from vjepa_fast.data.members import is_url, names_shards, stat_of
from vjepa_fast.errors import DataError


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
                state = "{} {}".format(*stat_of(path))
            except OSError:
                state = "missing"
            digest.update(f"{path}\0{label}\0{state}\n".encode(errors="surrogateescape"))
        return digest.hexdigest()


def load_manifest(path: str | os.PathLike[str], root: Root | None = None) -> Manifest:
    """Read a manifest, or .tar shards (see `read_shards`).

    Lines are ``<path> <label>``; ``::``, a tab or a comma separate as well, paths may hold blanks. A path in double
    quotes is taken as it is, with ``""`` for a quote. File names that are not UTF-8 keep their bytes. Relative paths
    are relative to ``root`` if there is one, else to the manifest's folder; if the first one is not there, to the
    working directory.

    Raises:
        DataError: missing or empty file, or a line that is not a path and a non-negative integer, or has more columns;
            or a file outside of ``root`` where that is refused.
    """
    manifest = _read(path, root)
    if root is not None:
        root.check(manifest.paths, manifest.path)
    return manifest


def _read(path: str | os.PathLike[str], root: Root | None) -> Manifest:
    file = Path(path)
    if names_shards(str(path)):
        return _of_shards(str(path), root)
    if file.is_dir():
        raise DataError(f"{file}: is a folder, not a manifest; make one with: vjepa-fast data manifest {file}")
    try:
        content = file.read_bytes().removeprefix(b"\xef\xbb\xbf")
    except FileNotFoundError:
        raise DataError(f"{file}: no such manifest; make one with: vjepa-fast data manifest FOLDER") from None
    except OSError as error:
        raise DataError(f"{file}: cannot read the manifest ({one_line(error)})") from None
    if b"\0" in content:
        raise DataError(f"{file}: cannot read the manifest (it is not text)")
    if lists_shards(content):
        return _of_shards(str(file), root)
    lines = re.split(r"\r\n|\r|\n", content.decode(errors="surrogateescape"))
    paths, labels = [], []
    for number, line in enumerate(lines, start=1):
        if line.strip():
            sample, label = _parse(line.strip(), f"{file}:{number}")
            paths.append(sample)
            labels.append(label)
    if not paths:
        raise DataError(f"{file}: the manifest is empty; it needs one '<path> <label>' line per sample")
    base = _base(file, paths[0]) if root is None else root.folder
    return _manifest(str(file), [p if os.path.isabs(p) else os.path.join(base, p) for p in paths], labels)


def _of_shards(entry: str, root: Root | None) -> Manifest:
    return _manifest(entry, *read_shards(entry, root))


def _manifest(path: str, paths: list[str], labels: list[int]) -> Manifest:
    images = sum(map(is_image_path, paths))
    kind = "image" if 2 * images > len(paths) else "video"
    if kind == "video" and not is_url(path):
        INDICES.use(path)
    return Manifest(Path(path).stem, path, paths, np.asarray(labels, np.int64), kind)


def _parse(line: str, where: str) -> tuple[str, int]:
    for separator in ("::", None, ","):
        parts = line.rsplit(separator, 1)
        if len(parts) == 2 and re.fullmatch("-?[0-9]{1,18}", parts[1].strip(), re.ASCII):
            label = int(parts[1])
            if label < 0:
                raise DataError(f"{where}: label {label} is negative; labels count from 0")
            path = parts[0].strip()
            return _path(path.removesuffix(",").rstrip() if separator is None else path, line, where), label
    raise DataError(f"{where}: expected '<path> <label>' with an integer label, found {line[:80]!r}")


def _path(text: str, line: str, where: str) -> str:
    """A path without its quotes. DataError if it seems to hold another column."""
    if len(text) > 1 and text[0] == text[-1] == '"':
        return text[1:-1].replace('""', '"')
    ahead = re.match(r"[0-9]+[,\t]\s*", text)
    after = re.search(r"[\s,]+[0-9]+$", text)
    if ahead or (after and suffix_of(text[: after.start()].rstrip('"')) in VIDEO_SUFFIXES | IMAGE_SUFFIXES):
        raise DataError(
            f"{where}: more than two columns in {line[:80]!r}; leave '<path> <label>', with the path in double quotes "
            "if this is its name"
        )
    return text


def quoted(path: str) -> str:
    """A path as it stands in a manifest: in double quotes where it could be taken for something else."""
    try:
        plain = _parse(f"{path} 0", "") == (path, 0)
    except DataError:
        plain = False
    return path if plain else '"' + path.replace('"', '""') + '"'


def _base(file: Path, first: str) -> str:
    folder = os.path.abspath(file.parent)
    if not os.path.isabs(first) and not os.path.exists(os.path.join(folder, first)) and os.path.exists(first):
        return os.getcwd()
    return folder
