"""A manifest without the samples that cannot be read. Needs no torch."""

from __future__ import annotations

import os
from collections.abc import Iterable

from vjepa_fast.data.manifests.manifest import Manifest, quoted
from vjepa_fast.data.members import member_of
from vjepa_fast.errors import DataError
from vjepa_fast.files import write_bytes


def write_clean(manifest: Manifest, bad: Iterable[str], out: str | os.PathLike[str]) -> int:
    """Write the lines of ``manifest`` whose files are not ``bad``, with paths that hold from where ``out`` lies.

    Args:
        manifest: of files; shards have no lines of their own.
        bad: paths as in ``manifest.paths``.
        out: the new manifest; it may be the old one. Relative paths are kept for files below its folder.

    Returns:
        How many samples are left.

    Raises:
        DataError: none is left, or the manifest is one of shards.
        UserError: ``out`` cannot be written.
    """
    if any(member_of(path) is not None for path in manifest.paths):
        raise DataError(f"{manifest.path}: lists shards, which have no lines to leave out; bad samples are skipped")
    bad, folder = set(bad), os.path.dirname(os.path.abspath(out))
    lines = [
        f"{quoted(_name(path, folder))} {label}\n"
        for path, label in zip(manifest.paths, manifest.labels.tolist(), strict=True)
        if path not in bad
    ]
    if not lines:
        raise DataError(f"{manifest.path}: none of its {len(manifest)} samples can be read, so nothing is written")
    write_bytes(os.fspath(out), "".join(lines).encode(errors="surrogateescape"), "choose another place")
    return len(lines)


def _name(path: str, folder: str) -> str:
    full = os.path.abspath(path)
    return os.path.relpath(full, folder) if full.startswith(folder + os.sep) else full
