"""Multinomial logistic regression on frozen features, with scikit-learn. Shapes: n samples, d features."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import numpy as np

from vjepa_fast.evaluation.extract.features import Features
from vjepa_fast.evaluation.probes.probe import PROBES, Probe, ProbeOptions, ProbeResult, checked_parts, result_of

C_GRID = (1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0)


@PROBES.register("linear")
class LinearProbe(Probe):
    """Logistic regression; the penalty is chosen on the validation part."""

    standardises = True

    def __call__(self, train: Features, val: Features | None, test: Features, options: ProbeOptions) -> ProbeResult:
        """`linear_probe` with its defaults."""
        return linear_probe(train, val, test, seed=options.seed)


def linear_probe(
    train: Features,
    val: Features | None,
    test: Features,
    *,
    c_grid: Sequence[float] = C_GRID,
    max_iter: int = 200,
    seed: int = 0,
) -> ProbeResult:
    """Logistic regression on features standardised by the training part; the penalty C is chosen on ``val``.

    Ties go to the smaller C. ``val=None`` holds out 20 % of ``train``, by class and ``seed``. Deterministic.
    DataError as `checked_parts`.
    """
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression

    train, val, test, _ = checked_parts(train, val, test, seed=seed)
    mean = train.x.mean(0, dtype=np.float64)
    std = train.x.std(0, dtype=np.float64)
    scale = np.where(std > 1e-6 * max(1.0, float(std.max())), 1.0 / np.maximum(std, 1e-30), 0.0)  # dead features: 0
    x_train, x_val, x_test = ((part.x - mean) * scale for part in (train, val, test))
    best, chosen, predicted = -1.0, {}, np.full(len(test), -1)
    model = LogisticRegression(max_iter=max_iter, warm_start=True)
    for c in sorted(c_grid):
        model.set_params(C=c)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)
            model.fit(x_train, train.y)
        accuracy = float(np.mean(model.predict(x_val) == val.y))
        if accuracy > best:
            best, chosen = accuracy, {"C": c, "val_accuracy": accuracy}
            predicted = np.asarray(model.predict(x_test))
    return result_of(predicted, test.y, chosen)
