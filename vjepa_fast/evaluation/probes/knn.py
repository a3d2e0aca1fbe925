"""Weighted k nearest neighbours by cosine. Shapes: n samples, d features.

Not scikit-learn's KNeighborsClassifier: that one sorts anew for every k and votes by weight only through a callable on
distances, while here one top-k of a matrix product answers all k.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from vjepa_fast.evaluation.extract.features import Features
from vjepa_fast.evaluation.probes.probe import PROBES, Probe, ProbeOptions, ProbeResult, checked_parts, result_of

K_GRID = (10, 20, 100, 200)


@PROBES.register("knn")
class KnnProbe(Probe):
    """Weighted k nearest neighbours; k is chosen on the validation part."""

    def __call__(self, train: Features, val: Features | None, test: Features, options: ProbeOptions) -> ProbeResult:
        """`knn_probe` with its defaults."""
        return knn_probe(train, val, test, seed=options.seed)


def knn_predict(
    train: Features, queries: np.ndarray, ks: Sequence[int], temperature: float = 0.07
) -> dict[int, np.ndarray]:
    """Votes of the k most similar training samples, each weighing exp(cosine / temperature), for several k at once.

    ``queries`` float ``[m, d]``; returns {k: labels int64 [m]}. Source: DINO (arXiv:2104.14294) and Wu et al. 2018.
    """
    import torch

    classes, y = np.unique(train.y, return_inverse=True)
    bank = torch.nn.functional.normalize(torch.from_numpy(np.ascontiguousarray(train.x)), dim=1)
    y = torch.from_numpy(y.reshape(-1))
    votes = {k: [] for k in ks}
    for rows in torch.from_numpy(np.ascontiguousarray(queries)).split(1024):
        sim, index = (torch.nn.functional.normalize(rows, dim=1) @ bank.T).topk(max(ks), dim=1)
        weight = ((sim - 1) / temperature).exp()  # the common factor exp(1/T) is left out
        for k in ks:
            score = torch.zeros(len(rows), len(classes)).scatter_add_(1, y[index[:, :k]], weight[:, :k])
            votes[k].append(score.argmax(1))
    return {k: classes[torch.cat(v).numpy()] for k, v in votes.items()}


def knn_probe(
    train: Features,
    val: Features | None,
    test: Features,
    *,
    ks: Sequence[int] = K_GRID,
    temperature: float = 0.07,
    seed: int = 0,
) -> ProbeResult:
    """K nearest neighbours by cosine with DINO's weights; k is chosen on ``val`` (ties: the smaller k).

    A k above the number of training samples is not tried; if all are, k is that number. DataError as `checked_parts`.
    """
    train, val, test, _ = checked_parts(train, val, test, seed=seed)
    n = len(train.y)
    usable = tuple(sorted({k for k in ks if k <= n})) or (n,)
    by_k = knn_predict(train, val.x, usable, temperature)
    scores = {k: float((by_k[k] == val.y).mean()) for k in usable}
    k = max(usable, key=lambda k: (scores[k], -k))
    predicted = knn_predict(train, test.x, (k,), temperature)[k]
    return result_of(predicted, test.y, {"k": k, "temperature": temperature, "val_accuracy": scores[k]})
