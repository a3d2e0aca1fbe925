"""Videos that are named one by one, by folders and by manifests, as one list."""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from vjepa_fast.data.manifests.manifest import Manifest, load_manifest
from vjepa_fast.data.manifests.root import Root
from vjepa_fast.data.media import IMAGE_SUFFIXES, VIDEO_SUFFIXES, is_image_path, suffix_of
from vjepa_fast.data.members import names_shards
from vjepa_fast.data.prepare.find import visible
from vjepa_fast.errors import DataError


@dataclass(frozen=True)
class Gathered:
    """``manifest``: the list; ``labelled``: its labels come from manifests (else they are 0); ``left_out``: images
    in folders of videos.
    """

    manifest: Manifest
    labelled: bool
    left_out: int = 0


def gather(sources: str | os.PathLike[str] | Iterable[str | os.PathLike[str]], root: Root | None = None) -> Gathered:
    """All samples of ``sources``, in order.

    Args:
        sources: a video or image, a folder (every video in it and below, by name; its images where it has no video), a
            manifest or .tar shards; or several of these.
        root: the folder that the paths of manifests start from, and that nothing lies outside of.

    Raises:
        DataError: nothing there, a folder without videos or images, videos beside images, or what lies outside of
            ``root``.
    """
    names = [sources] if isinstance(sources, str | os.PathLike) else list(sources)
    paths: list[str] = []
    labels: list[np.ndarray] = []
    labelled, left_out = bool(names), 0
    for name in [os.fspath(name) for name in names]:
        media = suffix_of(name) in VIDEO_SUFFIXES | IMAGE_SUFFIXES
        if os.path.isdir(name):
            found, images = _below(name)
            left_out += images
        elif media and not names_shards(name):
            found = [name]
        else:
            part = load_manifest(name, root)
            paths += part.paths
            labels.append(part.labels)
            continue
        if root is not None:
            root.check([os.path.abspath(path) for path in found], name)
        paths += found
        labels.append(np.zeros(len(found), np.int64))
        labelled = False
    if not paths:
        raise DataError("no video is named; give videos, folders or manifests")
    still = sum(map(is_image_path, paths))
    if still not in (0, len(paths)):
        raise DataError(f"{len(paths) - still} videos beside {still} images; give them in two calls")
    name = os.path.basename(os.path.normpath(os.fspath(names[0])))
    text = name if len(names) == 1 else f"{name} and {len(names) - 1} more"
    return Gathered(
        Manifest(name, text, paths, np.concatenate(labels), "image" if still else "video"), labelled, left_out
    )


def _below(folder: str) -> tuple[list[str], int]:
    """(the videos below a folder, or its images where there are none; how many images were left out)."""
    found = [path for path in visible(folder) if suffix_of(path) in VIDEO_SUFFIXES | IMAGE_SUFFIXES]
    videos = [path for path in found if not is_image_path(path)]
    if not found:
        raise DataError(f"{folder}: no video or image in it or in its folders")
    return videos or found, len(found) - len(videos) if videos else 0
