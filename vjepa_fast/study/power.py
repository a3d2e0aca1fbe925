"""What a paired comparison could have found: the smallest difference it is able to see, and tests of equivalence.

S seeds give S paired differences (fractions) of standard deviation sd; tests are Student's t with S - 1 degrees of
freedom, as in ``stats``. ``alpha`` is the level after correction.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache

import numpy as np

ALPHA = 0.05
POWER = 0.8
MARGIN = 0.02  # differences within +-2 points are called equivalent


def detection_power(shift: float, seeds: int, alpha: float = ALPHA) -> float:
    """Probability that a two-sided paired t test of ``seeds`` differences is significant at ``alpha``, where the true
    difference is ``shift`` standard errors (shift = difference * sqrt(seeds) / sd): the two tails of the noncentral t
    distribution beyond the critical value (Cohen 1988, *Statistical Power Analysis*, section 2.5).

    Integrated over the chi distribution of the estimated spread, which stays exact where few seeds and a small alpha
    give critical values at which series for the noncentral t do not converge. Raises ValueError for under two seeds.
    """
    from scipy import stats

    if seeds < 2:
        raise ValueError(f"the power of a test over {seeds} seed(s) cannot be told; at least 2 are needed")
    nodes, weights = np.polynomial.legendre.leggauss(200)
    spread = np.sqrt(stats.chi2.ppf((nodes + 1) / 2, seeds - 1) / (seeds - 1))  # of the estimated to the true sd
    beyond = stats.t.ppf(1 - alpha / 2, seeds - 1) * spread
    found = stats.norm.cdf(shift - beyond) + stats.norm.cdf(-shift - beyond)
    return float(weights @ found / 2)


@lru_cache(maxsize=256)
def _needed(seeds: int, alpha: float, power: float) -> float:
    """The difference in standard errors that is found with probability ``power``."""
    from scipy import optimize, stats

    high = float(stats.t.ppf(1 - alpha / 2, seeds - 1)) * 3 + 10
    found = optimize.brentq(lambda shift: detection_power(shift, seeds, alpha) - power, 0.0, high, xtol=1e-6)
    return float(found)  # pyright: ignore[reportArgumentType]  # scipy's stub has the form with details too


def smallest_detectable(deltas: Sequence[float], alpha: float = ALPHA, power: float = POWER) -> float | None:
    """Minimum detectable difference of a two-sided t test paired by seed.

    It is the true difference that is found at level ``alpha`` with probability ``power``: the delta of which
    detection_power(delta * sqrt(S) / sd, S, alpha) = power, sd the standard deviation (S - 1) of the ``deltas`` found.
    Close to (t(1 - alpha / 2, S - 1) + t(power, S - 1)) * sd / sqrt(S) for many seeds. None from one seed, or from
    seeds that all have the same difference: they show no spread, so it cannot be told.
    """
    d = np.asarray(deltas, dtype=np.float64)
    if d.size < 2 or np.ptp(d) < 1e-12:
        return None
    return _needed(d.size, alpha, power) * float(d.std(ddof=1)) / math.sqrt(d.size)


def equivalence_p(deltas: Sequence[float], margin: float = MARGIN) -> float | None:
    """p-value of the two one-sided t tests that the true difference lies within ``+-margin`` (TOST; Schuirmann 1987):
    the greater of both. Below alpha is the same as: the 1 - 2 alpha interval lies within the margin.

    0.0 where no seed differs at all; None where there is no spread to test by otherwise. Raises ValueError for a margin
    that is not above 0.
    """
    from scipy import stats

    if not margin > 0:
        raise ValueError(f"margin must be above 0, got {margin}")
    d = np.asarray(deltas, dtype=np.float64)
    if d.size < 2:
        return None
    if np.ptp(d) < 1e-12:
        return 0.0 if abs(d.mean()) < 1e-12 else None
    error = float(d.std(ddof=1)) / math.sqrt(d.size)
    return float(stats.t.sf((margin - abs(float(d.mean()))) / error, d.size - 1))
