"""Few-shot episodes: nearest prototype, many episodes as one batched product.

Shapes: E episodes, W ways (classes), S shots, Q queries per class, d features.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from vjepa_fast.errors import DataError
from vjepa_fast.evaluation.features import Features
from vjepa_fast.evaluation.intervals import mean_ci95


@dataclass(frozen=True)
class Episodes:
    """Sample indices of episodes: ``support`` int64 ``[E, W, S]`` and ``query`` int64 ``[E, W, Q]``; row w is one
    class.
    """

    support: np.ndarray
    query: np.ndarray


@dataclass(frozen=True)
class EpisodeResult:
    """Mean accuracy over episodes in [0, 1]; ``ci95`` is the half-width 1.96 std / sqrt(episodes)."""

    mean: float
    ci95: float
    episodes: int
    way: int
    shot: int
    queries: int
    accuracies: np.ndarray = field(default=None, repr=False)  # float64 [E], in the order the episodes were drawn
    by_sample: np.ndarray = field(default=None, repr=False)  # float64 [n], accuracy as a query; NaN: never one


def sample_episodes(labels: np.ndarray, way: int, shot: int, queries: int, episodes: int, seed: int) -> Episodes:
    """Draw episodes uniformly: ``way`` distinct classes each, ``shot + queries`` distinct samples of each class.

    The episodes depend on (labels, way, shot, queries, episodes, seed) alone, so that two encoders see the same ones.
    Raises DataError when there are too few classes or a class has too few samples.
    """
    labels = np.asarray(labels).reshape(-1)
    classes, counts = np.unique(labels, return_counts=True)
    need = shot + queries
    if min(way, shot, queries, episodes) < 1:
        raise DataError("few-shot episodes need way, shot, queries and episodes of at least 1")
    if len(classes) < way:
        raise DataError(f"{way}-way episodes need {way} classes, but there are {len(classes)}")
    if counts.min() < need:
        raise DataError(
            f"episodes need {need} samples per class ({shot} shots + {queries} queries), but class "
            f"{classes[counts.argmin()]} has {counts.min()}; lower the number of queries"
        )
    rng = np.random.default_rng(seed)
    members = np.full((len(classes), counts.max()), -1, dtype=np.int64)
    for row, label in enumerate(classes):
        members[row, : counts[row]] = np.flatnonzero(labels == label)
    picked = rng.random((episodes, len(classes))).argsort(axis=1)[:, :way]
    key = rng.random((episodes, way, members.shape[1]))
    pool = members[picked]
    key[pool < 0] = 2.0  # padding sorts last
    order = key.argsort(axis=2)[:, :, :need]
    index = np.take_along_axis(pool, order, axis=2)
    return Episodes(index[:, :, :shot], index[:, :, shot:])


def centred(features: Features, base: Features) -> Features:
    """``features`` minus the mean feature of ``base`` (base classes, never the novel ones), so that cosines compare
    what differs between clips rather than what all share. Source: SimpleShot, arXiv:1911.04623, section 3.
    """
    return Features(features.x - base.x.mean(0, dtype=np.float64), features.y, features.name)


def prototype_episodes(
    features: Features,
    way: int = 5,
    shot: int = 1,
    queries: int = 15,
    episodes: int = 1000,
    seed: int = 0,
    metric: str = "cosine",
    chunk: int = 512,
) -> EpisodeResult:
    """Accuracy of nearest-prototype classification over random episodes, with its 95 % interval.

    A prototype is the mean of the unnormalised shot features; ``metric="cosine"`` compares it with the query by cosine
    (Meta-Baseline, arXiv:2003.04390, section 3), ``"euclidean"`` by distance (Prototypical Networks, arXiv:1703.05175).
    All episodes of a chunk are one batched product. Raises DataError as :func:`sample_episodes`.
    """
    import torch

    if metric not in ("cosine", "euclidean"):
        raise ValueError(f"metric must be cosine or euclidean, got {metric!r}")
    drawn = sample_episodes(features.y, way, shot, queries, episodes, seed)
    x = torch.from_numpy(np.ascontiguousarray(features.x))
    truth = torch.arange(way).repeat_interleave(queries)
    accuracies = []
    right, asked = torch.zeros(2, len(x), dtype=torch.float64)
    for support, query in zip(torch.from_numpy(drawn.support).split(chunk), torch.from_numpy(drawn.query).split(chunk)):
        proto_EWd = x[support].mean(dim=2)
        query_EMd = x[query].flatten(1, 2)
        if metric == "cosine":
            proto_EWd = torch.nn.functional.normalize(proto_EWd, dim=-1)
            score_EMW = query_EMd @ proto_EWd.mT  # the query's own norm does not change which prototype wins
        else:
            score_EMW = 2 * query_EMd @ proto_EWd.mT - proto_EWd.square().sum(-1).unsqueeze(1)
        hit_EM = (score_EMW.argmax(-1) == truth).double()
        accuracies.append(hit_EM.mean(-1))
        asked += torch.bincount(query.flatten(), minlength=len(x))
        right += torch.bincount(query.flatten(), weights=hit_EM.flatten(), minlength=len(x))
    values = torch.cat(accuracies).numpy()
    mean, half = mean_ci95(values)
    return EpisodeResult(mean, half, episodes, way, shot, queries, values, (right / asked).numpy())
