"""Confidence intervals of accuracies, episode means and paired differences.

Wilson's interval and McNemar's test are a few lines each and the same as ``scipy.stats.binomtest`` (tests hold them to
it), which would compute a p-value for every interval and takes a second to import. ``scipy.stats.bootstrap`` resamples
samples one by one, where one multinomial draw is enough.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import comb, sqrt

import numpy as np

Z95 = 1.959963984540054


def wilson(correct: int, n: int, z: float = Z95) -> tuple[float, float]:
    """Wilson score interval ``(low, high)`` in [0, 1] of the proportion ``correct / n`` (Wilson 1927); 95 % by default.

    Raises ValueError unless ``0 <= correct <= n`` and ``n >= 1``.
    """
    if n < 1 or not 0 <= correct <= n:
        raise ValueError(f"need 0 <= correct <= n and n >= 1, got correct={correct}, n={n}")
    p = correct / n
    centre = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    low = 0.0 if correct == 0 else max(0.0, centre - half)
    high = 1.0 if correct == n else min(1.0, centre + half)
    return low, high


def mean_ci95(values: Sequence[float] | np.ndarray) -> tuple[float, float]:
    """``(mean, half-width)`` with half-width ``1.96 std / sqrt(n)`` and the population std, as few-shot papers report
    it.
    """
    x = np.asarray(values, dtype=np.float64).reshape(-1)
    if x.size == 0:
        raise ValueError("mean_ci95 needs at least one value")
    return float(x.mean()), float(1.96 * x.std() / sqrt(x.size))


def student_ci95(values: Sequence[float] | np.ndarray) -> tuple[float, float]:
    """``(mean, half-width)`` by Student's t with n - 1 degrees of freedom: t[0.975] times the standard error."""
    from scipy import stats

    x = np.asarray(values, dtype=np.float64).reshape(-1)
    if x.size < 2:
        raise ValueError(f"student_ci95 needs at least two values, got {x.size}")
    return float(x.mean()), float(stats.t.ppf(0.975, x.size - 1) * stats.sem(x))


@dataclass(frozen=True)
class PairedResult:
    """Accuracy of ``a`` minus accuracy of ``b`` on the same ``n`` test samples, as fractions."""

    difference: float
    ci95: tuple[float, float]
    p_value: float  # McNemar, exact, two-sided
    n: int

    @property
    def above(self) -> bool:
        """Whether the whole interval lies above zero."""
        return self.ci95[0] > 0

    @property
    def below(self) -> bool:
        """Whether the whole interval lies below zero."""
        return self.ci95[1] < 0


def paired_difference(correct_a, correct_b, *, resamples: int = 10_000, seed: int = 0) -> PairedResult:
    """95 % interval of the accuracy difference of two classifiers on the same samples (bootstrap over the samples).

    ``correct_a`` and ``correct_b``: bool ``[n]``, same order. A resample of n samples with replacement changes only
    how many fall to "a alone right" and "b alone right", so it is drawn as one multinomial: exact, fast, and the same
    for a seed.
    """
    a = np.asarray(correct_a, dtype=bool).reshape(-1)
    b = np.asarray(correct_b, dtype=bool).reshape(-1)
    if a.shape != b.shape or a.size == 0:
        raise ValueError(f"need two equally long, non-empty vectors, got {a.size} and {b.size}")
    n = a.size
    only_a, only_b = int((a & ~b).sum()), int((b & ~a).sum())
    draws = np.random.default_rng(seed).multinomial(
        n, [only_a / n, only_b / n, (n - only_a - only_b) / n], size=resamples
    )
    low, high = np.quantile((draws[:, 0] - draws[:, 1]) / n, [0.025, 0.975])
    return PairedResult((only_a - only_b) / n, (float(low), float(high)), mcnemar(only_a, only_b), n)


def mcnemar(only_a: int, only_b: int) -> float:
    """Exact two-sided McNemar p-value of ``only_a`` against ``only_b`` discordant samples (binomial, p = 1/2)."""
    n = only_a + only_b
    if n == 0:
        return 1.0
    tail = sum(comb(n, k) for k in range(min(only_a, only_b) + 1))
    # integer ratio first: 2**n overflows a float beyond 1023 discordant samples
    return min(1.0, 2 * tail / (1 << n))
