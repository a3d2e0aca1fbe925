"""Un-pooled frozen features: every token of several views of each sample, taken once, kept in shards on disk.

    CACHE/<name>-tokens-<24 hex digits of the key>/index.json      key, shapes, shards with their size and sha256
    CACHE/<name>-tokens-<...>/00000.safetensors, ...               x [rows, V, N, D], y [rows]

Shards are mapped into memory when rows of them are asked for, so that a cache may be larger than the memory. A stopped
extraction goes on after its last shard.

Legend: n samples, b rows, V = clips * crops views (view = clip * crops + crop), N tokens of the grid (T, H, W),
D width (embed_dim, or levels * embed_dim).
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from vjepa_fast.errors import CheckpointError, DataError, UserError
from vjepa_fast.evaluation.extract import features
from vjepa_fast.evaluation.extract.features import ClipSet, clip_settings, data_hash, encode, encoder_hash

FORMAT = 1  # raise it when the numbers that this file computes change: old caches are then refused
STORAGE = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
SHARD_BYTES = 256 * 2**20
MAX_BAD = 0.05  # share of unreadable samples


@dataclass(frozen=True)
class Shard:
    """Rows ``first`` to ``first + rows`` of a set, in memory (``x`` [rows, V, N, D]) or in a file."""

    first: int
    rows: int
    x: Tensor | None = field(default=None, repr=False)
    path: Path | None = None
    sha256: str = ""
    _checked: list = field(default_factory=list, repr=False, compare=False)  # not empty: the sum was found right

    def read(self, rows) -> Tensor:
        """Rows (numbers within the shard) as ``[b, V, N, D]``; CheckpointError if the file was changed or is gone."""
        if self.x is not None:
            return self.x[torch.as_tensor(rows)]
        from safetensors import SafetensorError, safe_open

        try:
            if not self._checked:
                if _sha256(self.path) != self.sha256:
                    raise CheckpointError(f"{self.path}: this token cache is damaged; delete its folder")
                self._checked.append(True)
            with safe_open(self.path, "pt") as file:  # maps the file: only the rows asked for are read
                return file.get_tensor("x")[torch.as_tensor(rows)]
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"{self.path}: the token cache cannot be read ({error}); delete its folder") from None


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
    index: np.ndarray = field(default=None, repr=False)  # the row in the shards of each sample

    def __post_init__(self):
        y = np.asarray(self.y, dtype=np.int64).reshape(-1)
        index = np.arange(len(y)) if self.index is None else np.asarray(self.index)
        if len(index) != len(y):
            raise DataError(f"{self.name}: {len(index)} samples but {len(y)} labels")
        object.__setattr__(self, "y", y)
        object.__setattr__(self, "index", index)

    def __len__(self) -> int:
        return len(self.y)

    def take(self, index) -> Tokens:
        """The samples of an index or bool mask ``[n]``."""
        return replace(self, y=self.y[index], index=self.index[index])

    def same_samples(self, other: Tokens) -> bool:
        """Whether both are the same rows of the same shards."""
        one, two = ([s.sha256 or (s.path, id(s.x)) for s in t.shards] for t in (self, other))
        return one == two and np.array_equal(self.index, other.index)

    def rows(self, index) -> Tensor:
        """Tokens ``[b, V, N, D]`` of the samples ``index`` int ``[b]``, in the dtype they are stored in.

        Raises DataError where they are not finite.
        """
        wanted = self.index[np.asarray(index)]
        firsts = np.array([s.first for s in self.shards])
        at = np.searchsorted(firsts, wanted, side="right") - 1
        out = None
        for number in np.unique(at):
            places = np.flatnonzero(at == number)
            part = self.shards[number].read(wanted[places] - firsts[number])
            if out is None:
                out = part.new_empty((len(wanted), *part.shape[1:]))
            out[torch.from_numpy(places)] = part
        if not torch.isfinite(out).all():
            raise DataError(f"{self.name}: features are not finite; the encoder gives NaN or infinity")
        return out


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


@torch.no_grad()
def extract_tokens(
    encoder: nn.Module,
    source,
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
    short: str | None = None,
    images: str = "repeat",
    dtype: torch.dtype | None = None,
    workers: int = 0,
    shard_bytes: int = SHARD_BYTES,
    on_progress=None,
) -> Tokens:
    """All tokens of ``clips`` x ``crops`` views of every readable sample of ``source`` (a data.Manifest or a ClipSet).

    Views as ``data.eval_views``; a ClipSet and still images hold one clip. ``batch_size`` counts views. ``storage``:
    bfloat16 (default), float16 or float32. ``dtype``: autocast (bfloat16 on CUDA by default, float32 elsewhere). With
    ``cache_dir`` tokens go to shards there, keyed by encoder weights, data and settings, else they stay in memory.
    Raises CheckpointError for a cache of another checkpoint, DataError for features that are not finite and for
    nothing readable, UserError where they do not fit the disk or the memory.
    """
    if storage not in STORAGE:
        raise UserError(f"unknown storage {storage!r}; choose from {', '.join(STORAGE)}")
    if images not in ("repeat", "single"):
        raise UserError(f"images must be repeat or single, got {images!r}")
    if clips < 1 or crops < 1:
        raise UserError(f"views: {clips} clips x {crops} crops; both must be at least 1")
    if isinstance(source, ClipSet) and (clips, crops) != (1, 1):
        raise UserError(f"{source.name}: {clips} x {crops} views need the video files, clips in memory are one view")
    device = torch.device(device or next(encoder.parameters()).device)
    dtype = dtype or (torch.bfloat16 if device.type == "cuda" else torch.float32)
    still = features._still(source)
    view = features._view(encoder, num_frames, crop_size, frame_step, short=short)
    views = (1 if still else clips, crops)
    key = {
        "format": FORMAT,
        "encoder": encoder_hash(encoder),
        "data": data_hash(source),
        "level": level,
        "view": {} if isinstance(source, ClipSet) else view,
        "views": list(views),
        "images": images,
        "dtype": str(dtype),
        "storage": storage,
        "mean_std": [
            list(clip_settings(encoder).get(k) or d)
            for k, d in (("mean", features.IMAGENET_MEAN), ("std", features.IMAGENET_STD))
        ],
    }
    store = _Store(None if cache_dir is None else cache_path(cache_dir, source.name, key), key, source.name)
    if store.complete:
        return store.tokens()
    was_training = encoder.training
    encoder.to(device).eval()
    total = len(source.labels)
    try:
        with torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32):
            for clip, label, last in _batches(source, views, batch_size, view, workers, store.done):
                if images == "single" and still:
                    clip = clip[:, :, :, :1]
                x, grid = [], None
                for part in clip.flatten(0, 1).split(batch_size):
                    z, grid = encode(encoder, part.to(device, non_blocking=True), level=level)
                    x.append(_stored(z, STORAGE[storage], source.name).cpu())
                x = torch.cat(x).unflatten(0, clip.shape[:2])
                store.add(x, label, last + 1, grid, total, shard_bytes)
                if on_progress:
                    on_progress(min(last + 1, total), total)
    finally:
        encoder.train(was_training)
    store.finish(total)
    return store.tokens()


def _stored(z: Tensor, storage: torch.dtype, name: str) -> Tensor:
    if not torch.isfinite(z).all():
        raise DataError(f"{name}: features are not finite; the encoder gives NaN or infinity")
    out = z.to(storage)
    if storage == torch.float16 and not torch.isfinite(out).all():
        raise DataError(f"{name}: features reach {z.abs().max().item():.3g}, too large for float16; store bfloat16")
    return out


def _batches(source, views, batch_size: int, view: dict, workers: int, first: int) -> Iterator[tuple]:
    """(uint8 [B, V, 3, F, S, S], labels [B], the last sample's place in the source) from sample ``first`` on."""
    size = max(1, batch_size // (views[0] * views[1]))
    if isinstance(source, ClipSet):
        for start in range(first, len(source), size):
            labels = torch.as_tensor(source.labels[start : start + size])
            yield source.clips[start : start + size, None], labels, start + len(labels) - 1
        return
    from vjepa_fast import data

    view = dict(view)
    frames, crop = view.pop("num_frames"), view.pop("crop_size")
    found = data.eval_views(
        source, frames, crop, size, clips=views[0], crops=views[1], first=first, workers=workers,
        max_bad_fraction=MAX_BAD, **view,
    )  # fmt: skip
    for clip, label, index in found:
        yield clip, torch.as_tensor(label), int(index[-1])


# ---------------------------------------------------------------- the store


def cache_path(cache_dir, name: str, key: dict) -> Path:
    """The folder of the tokens of ``key``: ``<cache_dir>/<name>-tokens-<24 hex digits of the key>``."""
    path = features.cache_path(cache_dir, f"{name}-tokens", key)
    return path.with_suffix("")


def open_tokens(folder: str | os.PathLike, *, encoder: nn.Module | None = None, source=None) -> Tokens:
    """Tokens of a finished cache folder, checked against an encoder and a data set where they are given.

    Raises CheckpointError if it is missing, unfinished, damaged, or belongs to another encoder or other data.
    """
    folder = Path(folder)
    index = _read_index(folder)
    if index is None or not index.get("complete"):
        raise CheckpointError(f"{folder}: no finished token cache (index.json is missing, damaged or not complete)")
    wanted = {}
    if encoder is not None:
        wanted["encoder"] = encoder_hash(encoder)
    if source is not None:
        wanted["data"] = data_hash(source)
    _refuse_other(folder, index["key"], wanted)
    name = folder.name.rsplit("-tokens-", 1)[0] if source is None else source.name
    store = _Store(folder, index["key"], name)
    if not store.complete:
        raise CheckpointError(f"{folder}: shards are missing or of another size; delete the folder")
    return store.tokens()


def _refuse_other(folder: Path, held: dict, wanted: dict) -> None:
    differs = [k for k in wanted if held.get(k) != wanted[k]]
    if differs:
        what = "another checkpoint" if "encoder" in differs else f"other settings ({', '.join(differs)})"
        raise CheckpointError(f"{folder}: this feature cache belongs to {what}; delete it or use another cache folder")


def _read_index(folder: Path) -> dict | None:
    try:
        index = json.loads((folder / "index.json").read_text())
        return index if isinstance(index["key"], dict) and isinstance(index["shards"], list) else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


class _Store:
    """Shards as they come; in memory without a folder. ``done``: samples of the source that are dealt with."""

    def __init__(self, folder: Path | None, key: dict, name: str):
        self.folder, self.name = folder, name
        self.index = {"key": key, "shards": [], "grid": None, "dim": None, "complete": False}
        self.memory: list[tuple[Tensor, Tensor]] = []
        self.waiting: list[tuple[Tensor, Tensor]] = []
        if folder is None or (found := _read_index(folder)) is None:
            return
        _refuse_other(folder, found["key"], key)
        whole = []
        for shard in found["shards"]:  # up to the first that is not as it was written
            path = folder / shard["file"]
            if not path.is_file() or path.stat().st_size != shard["bytes"]:
                break
            whole.append(shard)
        self.index = {**found, "shards": whole, "complete": found["complete"] and len(whole) == len(found["shards"])}

    @property
    def complete(self) -> bool:
        return self.index["complete"]

    @property
    def done(self) -> int:
        return self.index["shards"][-1]["until"] if self.index["shards"] else 0

    def add(self, x: Tensor, y: Tensor, until: int, grid, total: int, shard_bytes: int) -> None:
        """Rows ``x`` [b, V, N, D] with labels; ``until``: samples of the source dealt with so far."""
        if self.index["dim"] is None:
            self.index.update(grid=list(grid), dim=x.shape[-1], tokens=x.shape[2])
        if (tuple(self.index["grid"]), self.index["dim"]) != (tuple(grid), x.shape[-1]):
            raise DataError(f"{self.name}: the grid changes from {self.index['grid']} to {list(grid)}")
        if not self.memory and not self.waiting and not self.index["shards"]:
            self._room(total * x[0].numel() * x.element_size())
        if self.folder is None:
            self.memory.append((x, y))
            return
        self.waiting.append((x, y))
        if sum(part.numel() * part.element_size() for part, _ in self.waiting) >= shard_bytes:
            self._write(until)

    def finish(self, total: int) -> None:
        if self.waiting:
            self._write(total)
        self.index["complete"] = True
        rows = sum(s["rows"] for s in self.index["shards"]) + sum(len(y) for _, y in self.memory)
        if not rows:
            raise DataError(f"{self.name}: no readable sample to take features of")
        if total - rows > MAX_BAD * total:  # over all parts of an extraction that was stopped
            raise DataError(f"{self.name}: {total - rows} of {total} samples cannot be read, over {MAX_BAD:.0%}")
        if self.folder is not None:
            self._save_index()

    def tokens(self) -> Tokens:
        shards, labels, first = [], [], 0
        for part, y in self.memory:
            shards.append(Shard(first, len(y), part))
            labels.append(y.numpy())
            first += len(y)
        for shard in self.index["shards"]:
            shards.append(Shard(first, shard["rows"], path=self.folder / shard["file"], sha256=shard["sha256"]))
            labels.append(np.asarray(shard["labels"], dtype=np.int64))
            first += shard["rows"]
        views, grid = tuple(self.index["key"]["views"]), tuple(self.index["grid"])
        return Tokens(np.concatenate(labels), views, grid, self.index["dim"], tuple(shards), self.name)

    def _room(self, size: int) -> None:
        """UserError where ``size`` bytes do not fit."""
        if self.folder is None:
            free, where = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"), "free memory"
            hint = "give a cache folder, or fewer views"
        else:
            place = self.folder
            while not place.exists():
                place = place.parent
            free, where = shutil.disk_usage(place).free, f"disk of {place}"
            hint = "take fewer views, or another folder"
        if size > free:
            raise UserError(
                f"{self.name}: its tokens take {size / 1e9:.1f} GB, the {where} has {free / 1e9:.1f} GB; {hint}"
            )

    def _write(self, until: int) -> None:
        from safetensors.torch import save

        x, y = torch.cat([x for x, _ in self.waiting]), torch.cat([y for _, y in self.waiting])
        self.waiting = []
        blob = save({"x": x.contiguous(), "y": y.contiguous()})
        file = f"{len(self.index['shards']):05d}.safetensors"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            features._replace(self.folder / file, blob)
        except OSError as error:
            raise UserError(
                f"{self.folder}: the feature cache cannot be written ({error.strerror}); choose another folder"
            ) from None
        self.index["shards"].append({
            "file": file, "rows": len(y), "until": until, "bytes": len(blob),
            "sha256": hashlib.sha256(blob).hexdigest(), "labels": y.tolist(),
        })  # fmt: skip
        self._save_index()

    def _save_index(self) -> None:
        features._replace(self.folder / "index.json", json.dumps(self.index).encode())


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(2**20):
            digest.update(block)
    return digest.hexdigest()
