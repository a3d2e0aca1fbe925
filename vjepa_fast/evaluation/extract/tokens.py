"""Un-pooled frozen features: every token of several views of each sample, taken once, kept in shards on disk.

Shards are mapped into memory when rows of them are asked for, so that a cache may be larger than the memory. A stopped
extraction goes on after its last shard; the files are described in `vjepa_fast.evaluation.extract.shards`.

Legend: n samples, b rows, V = clips * crops views (view = clip * crops + crop), N tokens of the grid (T, H, W),
D width (embed_dim, or levels * embed_dim).
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from vjepa_fast.data.views.evaluation import eval_views
from vjepa_fast.errors import CheckpointError, DataError, UserError
from vjepa_fast.evaluation.choices import check_choice
from vjepa_fast.evaluation.extract.cache import cache_key, cache_stem, refuse_other
from vjepa_fast.evaluation.extract.clips import ClipSet, Source, clip_view, is_still
from vjepa_fast.evaluation.extract.features import IMAGES, encode_views, frozen, place_of
from vjepa_fast.evaluation.extract.shards import MAX_BAD, SHARD_BYTES, Shard, ShardStore, read_index
from vjepa_fast.models.interop import encoder_hash
from vjepa_fast.models.vit import VisionTransformer

FORMAT = 1  # raise it when the numbers that this file computes change: old caches are then refused
STORAGE = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


@dataclass(frozen=True)
class Tokens:
    """Tokens of ``n`` samples and their labels ``y`` int64 ``[n]``; ``take`` makes subsets without copying.

    ``views``: (clips, crops). ``grid``: (T, H, W). ``dim``: D.
    """

    y: np.ndarray
    views: tuple[int, int]
    grid: tuple[int, int, int]
    dim: int
    shards: tuple[Shard, ...] = field(repr=False)
    name: str = "tokens"
    index: np.ndarray = field(default=None, repr=False)  # pyright: ignore[reportAssignmentType]  # None: all rows

    def __post_init__(self):
        y = np.asarray(self.y, dtype=np.int64).reshape(-1)
        index = np.arange(len(y)) if self.index is None else np.asarray(self.index)
        if len(index) != len(y):
            raise DataError(f"{self.name}: {len(index)} samples but {len(y)} labels")
        object.__setattr__(self, "y", y)
        object.__setattr__(self, "index", index)

    def __len__(self) -> int:
        return len(self.y)

    def take(self, index: np.ndarray) -> Tokens:
        """The samples of an index or bool mask ``[n]``."""
        return replace(self, y=self.y[index], index=self.index[index])

    def same_samples(self, other: Tokens) -> bool:
        """Whether both are the same rows of the same shards."""
        one, two = ([s.sha256 or (s.path, id(s.x)) for s in t.shards] for t in (self, other))
        return one == two and np.array_equal(self.index, other.index)

    def rows(self, index: Sequence[int] | np.ndarray | range) -> Tensor:
        """Tokens ``[b, V, N, D]`` of the samples ``index`` int ``[b]``, in the dtype they are stored in.

        Raises DataError where they are not finite.
        """
        wanted = self.index[np.asarray(index)]
        firsts = np.array([s.first for s in self.shards])
        at = np.searchsorted(firsts, wanted, side="right") - 1
        out = torch.empty(0)
        for number in np.unique(at):
            places = np.flatnonzero(at == number)
            part = self.shards[number].read(wanted[places] - firsts[number])
            if not len(out):
                out = part.new_empty((len(wanted), *part.shape[1:]))
            out[torch.from_numpy(places)] = part
        _check_finite(out, self.name)
        return out


def _check_finite(z: Tensor, name: str) -> None:
    if not torch.isfinite(z).all():
        raise DataError(f"{name}: features are not finite; the encoder gives NaN or infinity")


def from_array(x, y, name: str = "tokens", views: tuple[int, int] = (1, 1)) -> Tokens:
    """Tokens in memory: ``x`` ``[n, N, D]`` or ``[n, V, N, D]``, ``y`` int ``[n]``. The grid is (1, 1, N)."""
    x = torch.as_tensor(x)
    x = x.unsqueeze(1) if x.ndim == 3 else x
    if x.ndim != 4 or len(x) != len(y) or x.shape[1] != views[0] * views[1]:
        raise DataError(
            f"{name}: tokens must be [n, {views[0] * views[1]} views, N, D] with n labels, got "
            f"{tuple(x.shape)} and {len(y)} labels"
        )
    return Tokens(y, views, (1, 1, x.shape[2]), x.shape[3], (Shard(0, len(x), x),), name)


# ---------------------------------------------------------------- extraction


def token_bytes(encoder: VisionTransformer, view: dict, views: int, level: str, storage: str) -> int:
    """Bytes that the tokens of one sample take; ``view`` as `clip_view` makes it."""
    size = view["crop_size"]
    width = encoder.embed_dim * (encoder.levels if level == "all" else 1)
    tokens = math.prod(encoder.grid((1, 3, view["num_frames"], size, size)))
    return views * tokens * width * STORAGE[storage].itemsize


@torch.no_grad()
def extract_tokens(
    encoder: VisionTransformer,
    source: Source,
    *,
    clips: int = 1,
    crops: int = 1,
    level: str = "last",
    storage: str = "bfloat16",
    batch_size: int = 16,
    device: str | torch.device | None = None,
    cache_dir: str | os.PathLike | None = None,
    num_frames: int | None = None,
    crop_size: int | None = None,
    frame_step: int | None = None,
    spread: str | None = None,
    short: str | None = None,
    geometry: str | None = None,
    images: str = "repeat",
    dtype: torch.dtype | None = None,
    workers: int = 0,
    shard_bytes: int = SHARD_BYTES,
    on_progress: Callable[[int, int], None] | None = None,
) -> Tokens:
    """All tokens of ``clips`` x ``crops`` views of every readable sample of ``source`` (a data.Manifest or a ClipSet).

    Views as ``data.eval_views``; a ClipSet and still images hold one clip. ``batch_size`` counts views. ``storage``:
    bfloat16 (default), float16 or float32. ``dtype``: autocast (bfloat16 on CUDA by default, float32 elsewhere). With
    ``cache_dir`` tokens go to shards there, keyed by encoder weights, data and settings, else they stay in memory.

    Raises:
        CheckpointError: a cache of another checkpoint.
        DataError: features that are not finite, or nothing readable.
        UserError: unknown settings, or tokens that do not fit the disk or the memory.
    """
    check_choice("storage", storage, STORAGE)
    check_choice("images", images, IMAGES)
    if clips < 1 or crops < 1:
        raise UserError(f"views: {clips} clips x {crops} crops; both must be at least 1")
    if isinstance(source, ClipSet) and (clips, crops) != (1, 1):
        raise UserError(f"{source.name}: {clips} x {crops} views need the video files, clips in memory are one view")
    device, dtype = place_of(encoder, device, dtype)
    still = is_still(source)
    view = clip_view(encoder, num_frames, crop_size, frame_step, spread=spread, short=short, geometry=geometry)
    views = (1 if still else clips, crops)
    how = {"level": level, "views": list(views), "images": images, "storage": storage}
    key = cache_key(encoder, source, view, dtype, format=FORMAT, **how)
    folder = None if cache_dir is None else cache_stem(cache_dir, f"{source.name}-tokens", key)
    store = ShardStore(folder, key, source.name)
    if store.complete:
        return _tokens_of(store)
    total = len(source.labels)

    def stored(z: Tensor, grid: tuple[int, int, int]) -> Tensor:
        return stored_as(z, STORAGE[storage], source.name)

    with frozen(encoder, device, dtype):
        for clip, label, last in _view_batches(source, views, batch_size, view, workers, store.done):
            if images == "single" and still:
                clip = clip[:, :, :, :1]
            x, grid = encode_views(encoder, clip, stored, device=device, batch_size=batch_size, level=level)
            store.add(x, label, last + 1, grid, total, shard_bytes)
            if on_progress:
                on_progress(min(last + 1, total), total)
    store.finish(total)
    return _tokens_of(store)


def stored_as(z: Tensor, storage: torch.dtype, name: str) -> Tensor:
    """Features in the dtype they are kept in; DataError where they are not finite, or become so."""
    _check_finite(z, name)
    out = z.to(storage)
    if storage == torch.float16 and not torch.isfinite(out).all():
        raise DataError(f"{name}: features reach {z.abs().max().item():.3g}, too large for float16; store bfloat16")
    return out


def _view_batches(
    source: Source, views: tuple[int, int], batch_size: int, view: dict, workers: int, first: int
) -> Iterator[tuple[Tensor, Tensor, int]]:
    """(uint8 [B, V, 3, F, S, S], labels [B], the last sample's place in the source) from sample ``first`` on."""
    size = max(1, batch_size // (views[0] * views[1]))
    if isinstance(source, ClipSet):
        for start in range(first, len(source), size):
            labels = torch.as_tensor(source.labels[start : start + size])
            yield source.clips[start : start + size, None], labels, start + len(labels) - 1
        return
    rest = {**view, "clips": views[0], "crops": views[1], "first": first, "workers": workers}
    frames, crop = rest.pop("num_frames"), rest.pop("crop_size")
    for clip, label, index in eval_views(source, frames, crop, size, max_bad_fraction=MAX_BAD, **rest):
        yield clip, torch.as_tensor(label), int(index[-1])


# ---------------------------------------------------------------- the cache


def _tokens_of(store: ShardStore) -> Tokens:
    labels, shards = store.contents()
    index = store.index
    return Tokens(labels, tuple(index["key"]["views"]), tuple(index["grid"]), index["dim"], shards, store.name)


def open_tokens(
    folder: str | os.PathLike, *, encoder: VisionTransformer | None = None, source: Source | None = None
) -> Tokens:
    """Tokens of a finished cache folder, checked against an encoder and a data set where they are given.

    Raises:
        CheckpointError: it is missing, unfinished, damaged, or belongs to another encoder or other data.
    """
    folder = Path(folder)
    index = read_index(folder)
    if index is None or not index.get("complete"):
        raise CheckpointError(f"{folder}: no finished token cache (index.json is missing, damaged or not complete)")
    wanted = {}
    if encoder is not None:
        wanted["encoder"] = encoder_hash(encoder)
    if source is not None:
        wanted["data"] = str(source.hash)
    refuse_other(folder, index["key"], wanted)
    name = folder.name.rsplit("-tokens-", 1)[0] if source is None else source.name
    store = ShardStore(folder, index["key"], name)
    if not store.complete:
        raise CheckpointError(f"{folder}: shards are missing or of another size; delete the folder")
    return _tokens_of(store)
