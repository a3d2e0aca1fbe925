"""What a data set consists of, and how fast it is read here: for ``vjepa-fast data check``."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable
from dataclasses import dataclass, replace

import torch

from vjepa_fast.config.schema import Config, DataConfig
from vjepa_fast.data.decoders import DECODERS
from vjepa_fast.data.decoders.index import FrameIndex
from vjepa_fast.data.decoders.index_cache import INDICES
from vjepa_fast.data.decoders.picture import shown_size
from vjepa_fast.data.loader import ClipLoader
from vjepa_fast.data.manifests.manifest import Manifest
from vjepa_fast.data.media import suffix_of
from vjepa_fast.data.members import stat_of
from vjepa_fast.files import first_line

_BATCH = 4  # clips read at once
_log = logging.getLogger("vjepa_fast.data")


@dataclass(frozen=True)
class Kind:
    """Files of one codec in one container.

    Attributes:
        codec: FFmpeg's name, empty for images. container: the suffix. files: how many. bytes: in all.
        size, rate, frames, gop: (least, most) of heights, frames per second, frames, and frames from one key frame to
            the next (of each file the most); None for images.
    """

    codec: str
    container: str
    files: int
    bytes: int
    size: tuple[int, int] | None
    rate: tuple[float, float] | None
    frames: tuple[int, int] | None
    gop: tuple[int, int] | None


def kinds(manifest: Manifest, bad: Iterable[str] = ()) -> list[Kind]:
    """The kinds of file of a manifest, the most frequent first; without the files that are ``bad``.

    Of videos those count whose frame index has been made, as `check_manifest` does.
    """
    members: dict[tuple[str, str], list[tuple[int, FrameIndex | None]]] = {}
    for path in set(manifest.paths) - set(bad):
        index = None if manifest.kind == "image" else INDICES.known(path)
        if index is None and manifest.kind != "image":
            continue
        key = "" if index is None else index.codec, suffix_of(path) or "none"
        members.setdefault(key, []).append((stat_of(path)[0], index))
    found = [_kind(codec, container, files) for (codec, container), files in members.items()]
    return sorted(found, key=lambda kind: (-kind.files, kind.codec, kind.container))


def _kind(codec: str, container: str, files: list[tuple[int, FrameIndex | None]]) -> Kind:
    total = sum(size for size, _ in files)
    indices = [index for _, index in files if index is not None]
    if not indices:
        return Kind(codec, container, len(files), total, None, None, None, None)
    heights, frames = [shown_size(i)[0] for i in indices], [i.frames for i in indices]
    rates, gops = [i.rate for i in indices], [_gop(i) for i in indices]
    return Kind(
        codec,
        container,
        len(files),
        total,
        (min(heights), max(heights)),
        (min(rates), max(rates)),
        (min(frames), max(frames)),
        (min(gops), max(gops)),
    )


def _gop(index: FrameIndex) -> int:
    """The longest way from one key packet to the next, or to the end."""
    keys = [0, *index.key.tolist(), index.packets]
    return max(after - before for before, after in zip(keys, keys[1:]))


@dataclass(frozen=True)
class Speed:
    """How fast a ``decoder`` reads clips in one thread, or ``why`` it does not."""

    decoder: str
    clips_per_s: float
    why: str = ""


def speeds(manifest: Manifest, data: DataConfig, seconds: float = 1.0) -> list[Speed]:
    """Clips per second of each decoder on samples of a manifest, in one thread and for so many seconds each.

    ``data``: the settings of clips; what else it holds does not count. Images are read in one way only.
    """
    names = ["pillow"] if manifest.kind == "image" else list(DECODERS)
    threads, silent = torch.get_num_threads(), _log.disabled
    torch.set_num_threads(1)
    _log.disabled = True  # bad samples have been listed
    try:
        return [_speed(name, manifest, data, seconds) for name in names]
    finally:
        torch.set_num_threads(threads)
        _log.disabled = silent


def _speed(name: str, manifest: Manifest, data: DataConfig, seconds: float) -> Speed:
    if name in DECODERS and (reasons := DECODERS.get_named(name, "decoder").objections()):
        return Speed(name, 0.0, "; ".join(reasons))
    decoder = name if name in DECODERS else "auto"
    one = dict(datasets=(manifest.path,), datasets_weights=None, num_workers=0, cache_mb=0, max_bad_fraction=1.0)
    cfg = Config(data=replace(data, **one, decoder=decoder, batch_size=_BATCH))
    try:
        with ClipLoader(cfg) as loader:
            next(loader)  # opens libraries
            begin, clips = time.perf_counter(), 0
            while clips == 0 or time.perf_counter() - begin < seconds:
                next(loader)
                clips += _BATCH
            return Speed(name, clips / (time.perf_counter() - begin))
    except Exception as error:  # whatever a library or a plugin does: the check itself is done
        return Speed(name, 0.0, first_line(error))
