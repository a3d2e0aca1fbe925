"""The geometry of a frozen encoder's features: collapse figures per level and per half (docs/geometry.md).

Shapes: n clips, q views of a clip, F frames, S pixels, L levels, E embed_dim, D = L * E.
"""

from __future__ import annotations

import os
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vjepa_fast.config.schema import AugmentConfig
from vjepa_fast.data.manifests.manifest import load_manifest
from vjepa_fast.data.manifests.root import Root
from vjepa_fast.errors import DataError, UserError
from vjepa_fast.evaluation.choices import check_choice
from vjepa_fast.evaluation.extract.clips import ClipSet, clip_settings, clip_view, decode_clips
from vjepa_fast.evaluation.extract.features import extract_features
from vjepa_fast.evaluation.run.encoders import Subject
from vjepa_fast.layers import channels
from vjepa_fast.metrics import geometry
from vjepa_fast.models.vit import VisionTransformer

METRICS = ("rankme", "lidar", "alpha_req", "feature_std", "mean_cosine")
SPLITS = ("depth", "channel")


def geometry_rows(
    encoder: VisionTransformer,
    clips: ClipSet,
    *,
    label: str = "target_encoder",
    split: str = "depth",
    views: int = 8,
    max_clips: int = 256,
    seed: int = 0,
    num_frames: int | None = None,
    batch_size: int = 16,
    device: str | torch.device | None = None,
) -> list[dict]:
    """Collapse figures of the mean-pooled features of ``clips``, one row per level and half.

    At most ``max_clips`` clips, drawn by ``seed``. RankMe, alpha-ReQ, standard deviation and mean cosine describe
    the clips as they are; LiDAR takes ``views`` views of each (``view_of``). ``split``: which channels are appearance
    and which dynamics, "depth" (halves of the concatenated levels, as FWM is published) or "channel" (halves of every
    level). ``num_frames``: what the encoder sees of a longer clip (None: as it was trained, or all).

    Rows are dicts: encoder (``label``), level (from 0, or "all"), subspace ("all", "appearance", "dynamics"), the five
    ``METRICS`` as floats, None where ``why`` (metric: reason) explains that there is none; clips, views, dim, split,
    alpha_range, the eigenvalues that alpha-ReQ was fitted to, and warnings, what a figure should be read with.

    Raises:
        DataError: fewer than two clips, shorter clips than ``num_frames``, or features that are not finite.
        UserError: an unknown split, or numbers below their least.
    """
    check_choice("split", split, SPLITS)
    if views < 0 or max_clips < 2:
        raise UserError(f"geometry needs views >= 0 and max_clips >= 2, got {views} and {max_clips}")
    if len(clips) < 2:
        raise DataError(f"{clips.name}: geometry compares clips with each other and needs at least 2, got {len(clips)}")
    levels = encoder.levels
    chosen = np.sort(np.random.default_rng(seed).permutation(len(clips))[:max_clips])
    there = clips.clips.shape[2]
    if num_frames is not None and not 1 <= num_frames <= there:
        raise DataError(f"{clips.name}: clips have {there} frames, {num_frames} were asked for")
    frames = num_frames or min(there, clip_settings(encoder).get("num_frames") or there)

    def features(view: int | None) -> Tensor:
        made = torch.stack([view_of(clips.clips[i], frames, view, (seed, int(i))) for i in chosen])
        part = ClipSet(made, clips.labels[chosen], f"{clips.hash} view {view} of {seed}", clips.name, clips.images)
        x = extract_features(encoder, part, pooling="mean", level="all", batch_size=batch_size, device=device).x
        bad = ~np.isfinite(x).reshape(len(x), levels, -1).all(axis=(0, 2))
        if bad.any():
            at = ", ".join(str(i) for i in bad.nonzero()[0])
            raise DataError(f"{clips.name}: features of {label} are not finite at level {at}; no figure describes them")
        return torch.from_numpy(x)

    plain = channels.subspaces(features(None), levels, split)
    seen = None
    if views >= 2:  # fewer have no spread within a clip
        seen = channels.subspaces(torch.stack([features(view) for view in range(views)], dim=1), levels, split)
    rows = []
    for (level, subspace), x in plain.items():
        found, why = _figures(x, None if seen is None else seen[level, subspace], views)
        n, d = x.shape
        warnings = []
        if seen is not None and n * (views - 1) < d:
            warnings.append(
                f"LiDAR of {d} channels from {n} clips x {views} views: the spread within clips has a lower rank and "
                "delta stands in for the rest; take more clips or views"
            )
        rows.append(
            {"encoder": label, "level": level, "subspace": subspace, **found, "why": why, "warnings": warnings}
            | {"clips": n, "views": views, "dim": d, "split": split, "alpha_range": list(geometry.fit_range(n, d))}
        )
    return rows


def _figures(x: Tensor, views: Tensor | None, number: int) -> tuple[dict, dict]:
    """The figures of ``x`` ``[n, d]`` and ``views`` ``[n, q, d]``, and why one is missing."""
    alpha = float(geometry.alpha_req(x))
    found = {
        "rankme": float(geometry.rankme(x)),
        "lidar": None if views is None else float(geometry.lidar(views)),
        "alpha_req": alpha if np.isfinite(alpha) else None,
        "feature_std": float(geometry.feature_std(x)),
        "mean_cosine": float(geometry.mean_cosine(x)),
    }
    why = {} if views is not None else {"lidar": f"needs at least 2 views of a clip, got views={number}"}
    if found["alpha_req"] is None:
        first, last = geometry.fit_range(*x.shape)
        few = last - first + 1 < geometry.MIN_FIT
        why["alpha_req"] = (
            f"{len(x)} clips of {x.shape[1]} channels have {min(len(x) - 1, x.shape[1])} eigenvalues, too few to fit"
            if few
            else f"some of eigenvalues {first} to {last} are zero: the features have a lower rank, no power law"
        )
    return found, why


def view_of(clip: Tensor, frames: int, view: int | None, key: tuple[int, int]) -> Tensor:
    """View number ``view`` of a uint8 clip ``[3, F, S, S]`` as ``[3, frames, S, S]``, a function of ``key``.

    None: the middle ``frames`` frames as they are. Otherwise the crop and flip of training (``data.augment``, its
    defaults), and where the clip is longer than ``frames``, a start drawn from all.
    """
    from vjepa_fast.data.views import augment

    spare = clip.shape[1] - frames
    if view is None:
        return clip[:, spare // 2 : spare // 2 + frames]
    generator = np.random.default_rng([*key, view])
    start = int(generator.integers(spare + 1))
    box = augment.random_view(generator, clip.shape[2], clip.shape[3], AugmentConfig())
    return augment.apply_view(clip[:, start : start + frames].permute(1, 2, 3, 0).numpy(), box, clip.shape[-1])


def checkpoint_geometry(
    path: str | os.PathLike,
    manifest: str,
    *,
    num_frames: int | None = None,
    crop_size: int | None = None,
    frame_step: int | None = None,
    extra_frames: int = 0,
    max_clips: int = 256,
    views: int = 8,
    seed: int = 0,
    split: str = "depth",
    batch_size: int = 16,
    root: str | None = None,
    **how: Any,
) -> list[dict]:
    """`geometry_rows` of the encoders in a checkpoint file or run folder, first the random-init control.

    ``manifest``: path of a CSV, of which only the chosen clips are read, each with ``extra_frames`` more than the
    encoder sees. ``root``: the folder its paths start from and stay in. ``how``: fields of `Subject`; nothing is
    cached.

    Raises:
        CheckpointError: as `Subject.encoders`.
        DataError: as `geometry_rows`, or an unreadable manifest.
    """
    subject, listed = Subject(path, **how), load_manifest(manifest, Root.given(root))
    encoders = subject.encoders()
    view = clip_view(encoders[0][2], num_frames, crop_size, frame_step)
    frames = view["num_frames"]
    chosen = np.sort(np.random.default_rng(seed).permutation(len(listed))[:max_clips])
    few = replace(listed, paths=[listed.paths[i] for i in chosen], labels=listed.labels[chosen])
    subject.say(f"decoding {len(few)} clips")
    clips = decode_clips(few, **{**view, "num_frames": frames + extra_frames})
    options = {"split": split, "views": views, "max_clips": max_clips, "seed": seed, "batch_size": batch_size}
    rows = []
    for label, _, encoder in encoders:
        subject.say(f"{label}: features of {len(clips)} clips, {views} views")
        rows += geometry_rows(
            encoder.to(subject.device), clips, label=label, num_frames=frames, device=subject.device, **options
        )
    return rows
