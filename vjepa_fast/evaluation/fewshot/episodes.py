"""Few-shot episodes: how they are drawn, and how one classifier is run over many of them at once.

Classifiers see inner products between samples only, so that after these the width of the features does not matter.
Shapes: E episodes, e of them in a chunk, W ways (classes), S shots, Q queries per class, N = W*S shots and M = W*Q
queries of an episode, class by class; n samples, d features.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TypedDict

import numpy as np
import torch
from torch import Tensor

from vjepa_fast.errors import ConfigError, DataError
from vjepa_fast.evaluation.choices import check_choice
from vjepa_fast.evaluation.extract.features import Features
from vjepa_fast.evaluation.intervals import mean_ci95

CENTERS = ("none", "base", "shots")
TABLE_BYTES = 256 * 2**20  # largest table of inner products between all samples
GATHER = 8 * 2**20  # floats of features gathered at once where there is no table


@dataclass(frozen=True)
class Episodes:
    """Sample indices of episodes: ``support`` int64 ``[E, W, S]`` and ``query`` int64 ``[E, W, Q]``; row w is one
    class.
    """

    support: np.ndarray
    query: np.ndarray


@dataclass(frozen=True)
class EpisodeResult:
    """Mean accuracy over episodes in [0, 1]; ``ci95`` is the half-width of its 95 % interval, by default 1.96 std /
    sqrt(episodes).
    """

    mean: float
    ci95: float
    episodes: int
    way: int
    shot: int
    queries: int
    accuracies: np.ndarray = field(repr=False)  # float64 [E], in the order the episodes were drawn
    by_sample: np.ndarray = field(repr=False)  # float64 [n], accuracy as a query; NaN: never one


class EpisodeOptions(TypedDict, total=False):
    """Options of every classifier, as `run_episodes` reads them."""

    base: Features | None
    center: str
    l2: bool
    interval: Callable[[np.ndarray], tuple[float, float]]
    chunk: int | None


@dataclass(frozen=True)
class Products:
    """Inner products of a chunk of episodes: ``ss [e, N, N]`` between shots, ``qs [e, M, N]`` of queries with shots,
    ``qq [e, M]`` of queries with themselves.
    """

    ss: Tensor
    qs: Tensor
    qq: Tensor

    def double(self) -> Products:
        """In float64."""
        return Products(self.ss.double(), self.qs.double(), self.qq.double())

    def centred(self) -> Products:
        """Those of the features less the mean of the episode's shots."""
        of_s, of_q = self.ss.mean(-1, keepdim=True), self.qs.mean(-1, keepdim=True)
        of_mean = of_s.mean(1, keepdim=True)
        return Products(
            self.ss - of_s - of_s.mT + of_mean,
            self.qs - of_q - of_s.mT + of_mean,
            self.qq - 2 * of_q.squeeze(-1) + of_mean.squeeze(-1),
        )

    def normalised(self) -> Products:
        """Those of the features divided by their norm; a zero vector stays zero."""
        s = _inverse_norm(self.ss.diagonal(dim1=1, dim2=2))
        q = _inverse_norm(self.qq)
        return Products(
            self.ss * s.unsqueeze(1) * s.unsqueeze(2), self.qs * q.unsqueeze(2) * s.unsqueeze(1), self.qq * q.square()
        )


def _inverse_norm(square: Tensor) -> Tensor:
    return torch.where(square > 0, square.clamp_min(1e-30).rsqrt(), 0.0)


# ---------------------------------------------------------------- drawing


def sample_episodes(labels: np.ndarray, way: int, shot: int, queries: int, episodes: int, seed: int) -> Episodes:
    """Draw episodes uniformly: ``way`` distinct classes each, ``shot + queries`` distinct samples of each class.

    The episodes depend on (labels, way, shot, queries, episodes, seed) alone, so that two encoders see the same ones.
    Labels may be any integers, with gaps. Time and memory do not grow with the classes' sizes. Raises DataError when
    there are too few classes or a class has too few samples.
    """
    labels = np.asarray(labels).reshape(-1)
    if min(way, shot, queries, episodes) < 1:
        raise DataError("few-shot episodes need way, shot, queries and episodes of at least 1")
    if labels.size == 0:
        raise DataError("no samples to draw episodes from")
    classes, counts = np.unique(labels, return_counts=True)
    need = shot + queries
    if len(classes) < way:
        raise DataError(f"{way}-way episodes need {way} classes, but there are {len(classes)}")
    if counts.min() < need:
        raise DataError(
            f"episodes need {need} samples per class ({shot} shots + {queries} queries), but class "
            f"{classes[counts.argmin()]} has {counts.min()}; lower the number of queries"
        )
    rng = np.random.default_rng(seed)
    by_class, first = labels.argsort(kind="stable"), counts.cumsum() - counts
    picked = _distinct(rng, np.full(episodes, len(classes)), way)
    index = by_class[first[picked][..., None] + _distinct(rng, counts[picked], need)]
    return Episodes(index[:, :, :shot], index[:, :, shot:])


def _distinct(rng: np.random.Generator, sizes: np.ndarray, k: int) -> np.ndarray:
    """Draw k distinct numbers below each of ``sizes``, in random order: int64 ``sizes.shape + (k,)``.

    Floyd's subsets (Bentley and Floyd, CACM 30(9), 1987), all at once; their order is not random, so it is shuffled.
    """
    drawn = np.empty((*sizes.shape, k), dtype=np.int64)
    for i in range(k):
        last = sizes - k + i
        new = rng.integers(0, last + 1)
        taken = (drawn[..., :i] == new[..., None]).any(-1)
        drawn[..., i] = np.where(taken, last, new)
    return rng.permuted(drawn, axis=-1)


# ---------------------------------------------------------------- features


def centred(features: Features, base: Features) -> Features:
    """``features`` minus the mean feature of ``base`` (base classes, never the novel ones), so that cosines compare
    what differs between clips rather than what all share. Source: SimpleShot, arXiv:1911.04623, section 3.
    """
    return Features(features.x - base.x.mean(0, dtype=np.float64), features.y, features.name)


def finite(features: Features) -> Features:
    """``features``, or DataError where there are none or one is NaN or infinite."""
    if len(features.y) == 0:
        raise DataError(f"{features.name}: no samples to draw episodes from")
    features.check_finite()
    return features


def prepare(features: Features, base: Features | None, center: str, l2: bool, any_origin: bool) -> np.ndarray:
    """Features float32 ``[n, d]`` after centring and L2 as far as both are the same in every episode.

    ``any_origin``: the classifier's answer does not depend on the origin, so it may be put where rounding is least.
    """
    check_choice("center", center, CENTERS)
    if center == "base":
        if base is None:
            raise ConfigError("centring by the base classes needs their features (--base); or centre by the shots")
        if base.x.shape[1] != features.x.shape[1]:
            widths = base.x.shape[1], features.x.shape[1]
            raise DataError(f"{base.name}: {widths[0]} features per sample, but {features.name} has {widths[1]}")
        features = centred(features, finite(base))
    x = finite(features).x.astype(np.float64)
    if l2 and center != "shots":
        norm = np.linalg.norm(x, axis=1, keepdims=True)
        x = np.divide(x, norm, out=np.zeros_like(x), where=norm > 0)
    if any_origin or center == "shots":
        x = x - x.mean(0)
    return np.ascontiguousarray(x, dtype=np.float32)


# ---------------------------------------------------------------- running


def run_episodes(
    features: Features,
    scores: Callable[[Products], Tensor],
    way: int,
    shot: int,
    queries: int,
    episodes: int,
    seed: int,
    *,
    base: Features | None = None,
    center: str = "none",
    l2: bool = False,
    any_origin: bool = False,
    interval: Callable[[np.ndarray], tuple[float, float]] = mean_ci95,
    chunk: int | None = None,
) -> EpisodeResult:
    """Accuracy over random episodes of the classifier ``scores(products) -> [e, M, W]``, the largest score winning.

    ``center``: "none"; "base", the mean of ``base`` is taken off (SimpleShot); "shots", the mean of each episode's
    own shots. ``l2``: features are then divided by their norm. ``interval(accuracies) -> (mean, half-width)``. Raises
    DataError for too few classes or samples, none at all, or features that are not finite.
    """
    x = torch.from_numpy(prepare(features, base, center, l2, any_origin))
    drawn = sample_episodes(features.y, way, shot, queries, episodes, seed)
    support, query = (torch.from_numpy(v).flatten(1) for v in (drawn.support, drawn.query))
    rows = support.shape[1] + query.shape[1]
    table = _table(x, episodes * rows)
    if chunk is None:
        chunk = 512 if table is not None else min(512, max(1, GATHER // (rows * x.shape[1])))
    truth = torch.arange(way).repeat_interleave(queries)
    hits = []
    for s, q in zip(support.split(chunk), query.split(chunk)):
        products = _products(x, table, s, q)
        if center == "shots":
            products = products.double().centred()
            products = products.normalised() if l2 else products
        hits.append(scores(products).argmax(-1) == truth)
    return result_of_hits(torch.cat(hits), query, len(x), way, shot, interval)


def result_of_hits(
    hits_EM: Tensor,
    query_EM: Tensor,
    samples: int,
    way: int,
    shot: int,
    interval: Callable[[np.ndarray], tuple[float, float]] = mean_ci95,
) -> EpisodeResult:
    """The EpisodeResult of bool ``hits`` ``[E, M]`` of the queries with indices ``query`` ``[E, M]`` of ``samples``."""
    hit_EM = hits_EM.double()
    asked = torch.bincount(query_EM.flatten(), minlength=samples)
    right = torch.bincount(query_EM.flatten(), weights=hit_EM.flatten(), minlength=samples)
    values = hit_EM.mean(1).numpy()
    mean, half = interval(values)
    queries = query_EM.shape[1] // way
    return EpisodeResult(mean, half, len(values), way, shot, queries, values, (right / asked).numpy())


def _table(x: Tensor, drawn: int) -> Tensor | None:
    """All inner products ``[n, n]``, where they fit and cost less than products of the ``drawn`` rows."""
    n = len(x)
    return x @ x.T if 4 * n * n <= TABLE_BYTES and n * n <= 128 * drawn else None


def _products(x: Tensor, table: Tensor | None, support: Tensor, query: Tensor) -> Products:
    if table is None:
        x_s, x_q = x[support], x[query]
        return Products(x_s @ x_s.mT, x_q @ x_s.mT, x_q.square().sum(-1))
    n, flat = len(x), table.view(-1)
    columns = support.unsqueeze(1)
    return Products(
        flat[support.unsqueeze(2) * n + columns], flat[query.unsqueeze(2) * n + columns], flat[query * (n + 1)]
    )
