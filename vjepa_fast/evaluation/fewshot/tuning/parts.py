"""Base, validation and novel classes, looked at as a whole before anything is trained."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import TypeAlias

import numpy as np
import torch
from torch import Tensor

from vjepa_fast.data.views.evaluation import eval_clip
from vjepa_fast.errors import DataError
from vjepa_fast.evaluation.extract.clips import ClipSet, Source, clip_view, decode_clips, fits_in_memory
from vjepa_fast.evaluation.extract.features import Features
from vjepa_fast.evaluation.fewshot.episodes import sample_episodes
from vjepa_fast.evaluation.fewshot.tuning.settings import TuneSettings
from vjepa_fast.models.vit import VisionTransformer

log = logging.getLogger("vjepa_fast")


@dataclass(frozen=True)
class Part:
    """Base, validation or novel classes. ``labels`` int64 ``[n]`` from 0 without gaps; ``fetch(rows)`` gives clips
    uint8 ``[B, 3, F, S, S]`` or features float32 ``[B, d]``; ``key`` names the content.
    """

    role: str
    name: str
    labels: np.ndarray
    fetch: Callable[[np.ndarray], Tensor] = field(repr=False)
    key: object = field(repr=False)
    ids: tuple[int, ...] = ()  # the numbers that the classes have in the source
    features: bool = False

    @property
    def classes(self) -> int:
        """How many there are."""
        return int(self.labels.max()) + 1

    def take(self, rows: np.ndarray) -> Part:
        """Some samples of it, under the same role; labels counted anew."""
        kept, labels = np.unique(self.labels[rows], return_inverse=True)
        ids = tuple(self.ids[k] for k in kept)
        return replace(self, labels=labels.reshape(-1), fetch=lambda i: self.fetch(rows[i]), ids=ids)


Parts: TypeAlias = tuple[Part, Part, Part]  # base, val, novel
Labelled: TypeAlias = Source | Part
AS_TRAINED = TuneSettings()


def part_of(
    source: Source | Features, role: str, encoder: VisionTransformer | None, settings: TuneSettings = AS_TRAINED
) -> Part:
    """The Part of a ClipSet, a data.Manifest (``encoder`` and ``settings`` give its view) or Features.

    Raises DataError: no samples, one class only, features that are not finite, clips that are not square.
    """
    name = f"{role} part {source.name}"
    raw = np.asarray(source.y if isinstance(source, Features) else source.labels).reshape(-1)
    if not len(raw):
        raise DataError(f"{name}: no samples")
    ids, labels = np.unique(raw, return_inverse=True)
    ids, labels = tuple(ids.tolist()), labels.reshape(-1)
    if len(ids) == 1:
        raise DataError(f"{name}: one class only; few-shot tuning needs at least two")
    if isinstance(source, Features):
        replace(source, name=name).check_finite()
        x = torch.from_numpy(np.ascontiguousarray(source.x))
        key = hashlib.sha256(x.numpy().tobytes()).hexdigest()
        return Part(role, source.name, labels, lambda rows: x[torch.as_tensor(rows)], key, ids, True)
    if encoder is None:
        raise DataError(f"{name}: clips need an encoder; without one give Features")
    if isinstance(source, ClipSet):
        clips = source.clips
        if clips.dtype != torch.uint8 or clips.dim() != 5 or clips.shape[-1] != clips.shape[-2]:
            raise DataError(f"{name}: clips must be uint8 [n,3,F,S,S], got {clips.dtype} {tuple(clips.shape)}")
        return Part(role, source.name, labels, lambda rows: clips[torch.as_tensor(rows)], source.hash, ids)
    how = clip_view(encoder, settings.num_frames, settings.crop_size, settings.frame_step, short=settings.short)
    if fits_in_memory(len(source), how):
        return part_of(decode_clips(source, **how), role, encoder)

    def fetch(rows: np.ndarray) -> Tensor:
        def one(row: int) -> Tensor:
            return eval_clip(source.paths[row], **how)

        if settings.workers < 1:
            return torch.stack([one(r) for r in rows])
        with ThreadPoolExecutor(settings.workers) as pool:
            return torch.stack(list(pool.map(one, rows)))

    return Part(role, source.name, labels, fetch, str(source.hash), ids)


def parts_of(
    encoder: VisionTransformer | None,
    base: Source | Features,
    val: Source | Features | None,
    novel: Source | Features,
    settings: TuneSettings,
    seed: int,
) -> tuple[Parts, list[str]]:
    """((base, val, novel), notes), looked at as a whole before anything is trained.

    ``val`` None: a fifth of the base classes, but at least ``meta.val_way``, is set aside for it.

    Raises DataError: as :func:`part_of`; too few classes or samples per class for the episodes of a part; two parts
    that are the same data; features of unequal width.
    """
    meta, notes = settings.meta, []
    base_part, novel_part = part_of(base, "base", encoder, settings), part_of(novel, "novel", encoder, settings)
    if val is None:
        whole, count = base_part, max(meta.val_way, base_part.classes // 5)
        if whole.classes - count < 2:
            raise DataError(
                f"base part {whole.name}: no validation classes given and only {whole.classes} base classes, of which "
                f"{count} would have to be set aside; give validation classes or lower val_way"
            )
        held = np.random.default_rng(seed).permutation(whole.classes)[:count]
        val_rows, base_rows = (np.flatnonzero(np.isin(whole.labels, held) == side) for side in (True, False))
        val_part = replace(whole.take(val_rows), role="val", key=None)
        base_part = replace(whole.take(base_rows), name=f"{whole.name} less {count} classes set aside for validation")
        notes.append(f"{count} of the base classes were set aside as validation classes")
    else:
        val_part = part_of(val, "val", encoder, settings)
    parts = base_part, val_part, novel_part
    for one, other in ((base_part, novel_part), (val_part, novel_part), (base_part, val_part)):
        if one.key == other.key:
            raise DataError(f"{one.role} and {other.role} part are the same data ({one.name}); classes must be apart")
        if one.features != other.features:
            raise DataError(f"{one.role} and {other.role} part: give clips for all parts or features for all")
        if shared := sorted(set(one.ids) & set(other.ids)):
            notes.append(
                f"{one.role} and {other.role} part share class numbers ({', '.join(map(str, shared[:8]))}"
                f"{', ...' if len(shared) > 8 else ''}): taken for numberings of their own; if these are the same "
                "classes, the accuracy is not one on unseen classes"
            )
            log.warning(notes[-1])
    widths = {p.role: p.fetch(np.array([0])).shape[1:] for p in parts}
    if len(set(widths.values())) > 1:
        shapes = ", ".join(f"{k} {tuple(v)}" for k, v in widths.items())
        raise DataError(f"few-shot tuning: samples of unequal shape: {shapes}")
    check_counts(*parts, settings)
    if meta.reduce_way and base_part.classes < meta.way:
        taken = base_part.classes
        notes.append(f"meta stage: {meta.way}-way asked for, but {taken} base classes; {taken}-way taken")
        log.warning(notes[-1])
    return parts, notes


def check_counts(base: Labelled, val: Labelled | None, novel: Labelled, settings: TuneSettings) -> None:
    """DataError where a part has too few classes or samples for its episodes."""
    meta, classes = settings.meta, len(np.unique(base.labels))
    asked = [("base", base, min(meta.way, classes) if meta.reduce_way else meta.way, meta.shot, meta.queries)]
    asked += [] if val is None else [("val", val, meta.val_way, meta.shot, meta.val_queries)]
    asked += [("novel", novel, settings.way, shot, settings.queries) for shot in settings.shots]
    for role, part, way, shot, queries in asked:
        try:
            sample_episodes(part.labels, way, shot, queries, 1, 0)
        except DataError as error:
            raise DataError(f"{role} part {part.name}: {error}") from None
