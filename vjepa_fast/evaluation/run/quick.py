"""A quick probe for ``monitor.probe``: the same few labelled clips, again and again, while an encoder trains.

Its accuracy is for curves, not for tables: few clips, the centre view, one reading. Nothing is chosen by it.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import nn

from vjepa_fast.config.schema import Config
from vjepa_fast.data.manifests.manifest import Manifest, load_manifest
from vjepa_fast.data.manifests.root import Root
from vjepa_fast.data.synthetic import SUITES, render_clip
from vjepa_fast.evaluation.controls import random_encoder
from vjepa_fast.evaluation.extract.clips import ClipSet, Source, clip_view, decode_clips, fits_in_memory
from vjepa_fast.evaluation.extract.features import extract_features
from vjepa_fast.evaluation.probes import PROBES, ProbeOptions
from vjepa_fast.evaluation.tasks import check_apart, check_labels, check_within
from vjepa_fast.models.vit import VisionTransformer


def quick_probe(cfg: Config, device: torch.device) -> Callable[[nn.Module], dict[str, float]]:
    """What ``train(cfg, probe=quick_probe)`` asks: data and an encoder for ``cfg.monitor``, made once.

    Features are pooled over space, time steps side by side ("time"), of the last level, in float32 on the CPU and
    bfloat16 on CUDA. A fifth of the training clips chooses k or the penalty; the validation clips are read once.

    Returns:
        A function of an encoder of ``cfg`` (its weights are copied) that returns ``{"probe_knn": accuracy in [0, 1]}``.

    Raises:
        DataError: a manifest cannot be used, or fewer than two classes.
        ConfigError: no such suite or probe.
    """
    monitor = cfg.monitor
    name = str(monitor.probe)
    encoder, entry = random_encoder(cfg), PROBES.get_named(name, "monitor.probe")
    if monitor.train is None or monitor.val is None:
        train, val = (_rendered(monitor.suite, monitor.clips, part, encoder) for part in (0, 1))
    else:
        train, val = _listed(monitor.train, monitor.val, monitor.clips, encoder, Root.of(cfg.data))

    def probe(trained: nn.Module) -> dict[str, float]:
        encoder.load_state_dict(trained.state_dict())
        parts = [extract_features(encoder, source, pooling="time", device=device) for source in (train, val)]
        return {f"probe_{name}": entry()(parts[0], None, parts[1], ProbeOptions(seed=0)).accuracy}

    return probe


def _rendered(suite: str, clips: int, part: int, encoder: VisionTransformer) -> ClipSet:
    """Clips of a suite's training classes, as many of each; two parts have none in common."""
    view = clip_view(encoder, None, None, None)
    labels = SUITES.get_named(suite, "monitor.suite").split_labels("train")
    size, frames = view["crop_size"], view["num_frames"]
    out, y = [], []
    for i in range(clips):
        place = i % len(labels)
        drawn, _, _ = render_clip(suite, np.random.default_rng([part, i]), size, frames, labels[place])
        out.append(np.broadcast_to(drawn, (frames, size, size, 3)).transpose(3, 0, 1, 2))
        y.append(place)
    return ClipSet(torch.from_numpy(np.stack(out)), np.array(y), f"{suite}-{part}", suite)


def _listed(train: str, val: str, clips: int, encoder: VisionTransformer, root: Root | None) -> tuple[Source, Source]:
    """The first samples of every class of two manifests: at most ``clips`` in each, at least four of a class."""
    view = clip_view(encoder, None, None, None)
    parts = {"train": load_manifest(train, root), "val": load_manifest(val, root)}
    check_apart(parts)
    classes = check_labels(parts["train"].labels, train)
    check_within(parts["val"].labels, val, classes)
    used = min(classes, max(2, clips // 4))
    few = {role: _few(manifest, clips, used) for role, manifest in parts.items()}
    if not fits_in_memory(sum(map(len, few.values())), view):
        return few["train"], few["val"]
    return decode_clips(few["train"], **view), decode_clips(few["val"], **view)


def _few(manifest: Manifest, clips: int, classes: int) -> Manifest:
    """The first of each of the first ``classes``, then the second of each, ...: at most ``clips`` samples."""
    rank = np.zeros(len(manifest), np.int64)
    for label in range(classes):
        members = np.flatnonzero(manifest.labels == label)
        rank[members] = np.arange(len(members))
    there = np.flatnonzero(manifest.labels < classes)
    kept = np.sort(there[np.lexsort((manifest.labels[there], rank[there]))][:clips])
    return Manifest(
        manifest.name, manifest.path, [manifest.paths[i] for i in kept], manifest.labels[kept], manifest.kind
    )
