"""Probes of frozen features: multinomial logistic regression and weighted k nearest neighbours.

Whatever can be chosen (the strength of the penalty, k) is chosen on the validation part; the test part is read once,
at the end. Shapes: n samples, d features.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass, field

import numpy as np

from vjepa_fast.errors import DataError
from vjepa_fast.evaluation.extract.features import Features
from vjepa_fast.evaluation.intervals import wilson
from vjepa_fast.evaluation.tasks import check_labels, check_within

C_GRID = (1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0)
K_GRID = (10, 20, 100, 200)


@dataclass(frozen=True)
class ProbeResult:
    """Test accuracy in [0, 1] with its Wilson interval ``ci95 = (low, high)`` over ``n`` test samples."""

    accuracy: float
    ci95: tuple[float, float]
    n: int
    chosen: dict = field(default_factory=dict)  # hyperparameters, with the validation accuracy that chose them
    correct: np.ndarray = field(default=None, repr=False)  # bool [n], in the order of the test samples


def result_of(predicted: np.ndarray, labels: np.ndarray, chosen: dict) -> ProbeResult:
    """The ProbeResult of predictions int ``[n]`` against labels int ``[n]``."""
    correct = np.asarray(predicted) == np.asarray(labels)
    hits, n = int(correct.sum()), int(correct.size)
    return ProbeResult(hits / n, wilson(hits, n), n, chosen, correct)


def held_out(y: np.ndarray, name: str, fraction: float = 0.2, seed: int = 0) -> np.ndarray:
    """Which of the labels ``y`` [n] are held out, bool ``[n]``: ``fraction`` of each class, at least one sample where
    it has two. DataError where no class has.
    """
    rng = np.random.default_rng(seed)
    held = np.zeros(len(y), dtype=bool)
    for label in np.unique(y):
        members = rng.permutation(np.flatnonzero(y == label))
        if len(members) > 1:
            held[members[: max(1, round(fraction * len(members)))]] = True
    if not held.any():
        raise DataError(f"{name}: too few samples to hold out a validation part; give one with --val")
    return held


def split_validation(train: Features, fraction: float = 0.2, seed: int = 0) -> tuple[Features, Features]:
    """Take ``fraction`` of each class (at least one sample, where it has two) off ``train``: (rest, validation)."""
    held = held_out(train.y, train.name, fraction, seed)
    return train.take(~held), train.take(held)


def _prepare(train: Features, val: Features | None, test: Features, seed: int) -> tuple[Features, Features, Features]:
    if len(train.y) and len(np.unique(train.y)) < 2:
        raise DataError(f"{train.name}: a probe needs at least two classes in the training part")
    classes = check_labels(train.y, train.name)
    for part in (test,) if val is None else (val, test):
        check_within(part.y, part.name, classes)
    if val is not None and np.array_equal(val.x, test.x):
        raise DataError(f"{val.name}: validation and test part are the same samples; the choice would see the test")
    if val is None:
        train, val = split_validation(train, seed=seed)
    for part in (train, val, test):
        if part.x.shape[1] != train.x.shape[1]:
            raise DataError(
                f"{part.name}: {part.x.shape[1]} features per sample, but {train.name} has {train.x.shape[1]}"
            )
        if not np.isfinite(part.x).all():
            raise DataError(f"{part.name}: features are not finite; the encoder gives NaN or infinity")
    return train, val, test


def linear_probe(
    train: Features, val: Features | None, test: Features, *, c_grid=C_GRID, max_iter: int = 200, seed: int = 0
) -> ProbeResult:
    """Logistic regression on features standardised by the training part; the penalty C is chosen on ``val``.

    Ties go to the smaller C. ``val=None`` holds out 20 % of ``train``, by class and ``seed``. Deterministic. Raises
    DataError for empty parts, unequal widths, non-finite features, a single class, label gaps, labels that ``train``
    does not have, and where ``val`` and ``test`` are the same samples.
    """
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression

    train, val, test = _prepare(train, val, test, seed)
    mean = train.x.mean(0, dtype=np.float64)
    std = train.x.std(0, dtype=np.float64)
    scale = np.where(std > 1e-6 * max(1.0, float(std.max())), 1.0 / np.maximum(std, 1e-30), 0.0)  # dead features: 0
    x_train, x_val, x_test = ((part.x - mean) * scale for part in (train, val, test))
    best, chosen, predicted = -1.0, {}, None
    model = LogisticRegression(max_iter=max_iter, warm_start=True)
    for c in sorted(c_grid):
        model.set_params(C=c)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)
            model.fit(x_train, train.y)
        accuracy = float((model.predict(x_val) == val.y).mean())
        if accuracy > best:
            best, chosen = accuracy, {"C": c, "val_accuracy": accuracy}
            predicted = model.predict(x_test)
    return result_of(predicted, test.y, chosen)


def knn_predict(train: Features, queries: np.ndarray, ks, temperature: float = 0.07) -> dict[int, np.ndarray]:
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
    train: Features, val: Features | None, test: Features, *, ks=K_GRID, temperature: float = 0.07, seed: int = 0
) -> ProbeResult:
    """K nearest neighbours by cosine with DINO's weights; k is chosen on ``val`` (ties: the smaller k).

    A k above the number of training samples is not tried; if all are, k is that number. Errors as :func:`linear_probe`.
    """
    train, val, test = _prepare(train, val, test, seed)
    n = len(train.y)
    usable = tuple(sorted({k for k in ks if k <= n})) or (n,)
    by_k = knn_predict(train, val.x, usable, temperature)
    scores = {k: float((by_k[k] == val.y).mean()) for k in usable}
    k = max(usable, key=lambda k: (scores[k], -k))
    predicted = knn_predict(train, test.x, (k,), temperature)[k]
    return result_of(predicted, test.y, {"k": k, "temperature": temperature, "val_accuracy": scores[k]})
