import numpy as np
import pytest
from scipy import stats

from vjepa_fast.evaluation.intervals import mcnemar, mean_ci95, paired_difference, wilson


@pytest.mark.parametrize(("k", "n"), [(0, 10), (1, 10), (37, 400), (200, 400), (400, 400)])
def test_wilson_equals_scipy(k, n):
    ci = stats.binomtest(k, n).proportion_ci(0.95, method="wilson")
    assert wilson(k, n) == pytest.approx((ci.low, ci.high), abs=1e-12)


def test_wilson_covers_the_truth_about_95_percent():
    rng = np.random.default_rng(0)
    hits = rng.binomial(200, 0.125, size=4000)
    bounds = {k: wilson(int(k), 200) for k in np.unique(hits)}
    covered = np.mean([bounds[k][0] <= 0.125 <= bounds[k][1] for k in hits])
    assert 0.93 < covered < 0.97


@pytest.mark.parametrize(("k", "n"), [(1, 0), (-1, 5), (6, 5)])
def test_wilson_refuses_nonsense(k, n):
    with pytest.raises(ValueError, match="correct"):
        wilson(k, n)


def test_mean_ci95_formula():
    mean, half = mean_ci95([0.2, 0.4, 0.6, 0.8])
    assert mean == pytest.approx(0.5)
    assert half == pytest.approx(1.96 * np.sqrt(0.05) / 2)
    with pytest.raises(ValueError, match="at least one value"):
        mean_ci95([])


@pytest.mark.parametrize(("a", "b"), [(0, 0), (3, 12), (12, 3), (5, 5), (900, 700)])
def test_mcnemar_equals_the_binomial_test(a, b):
    expected = stats.binomtest(a, a + b).pvalue if a + b else 1.0
    assert mcnemar(a, b) == pytest.approx(expected, rel=1e-9)


def test_paired_difference_is_narrower_when_the_classifiers_agree():
    rng = np.random.default_rng(1)
    b = rng.random(500) < 0.4
    a = b.copy()
    a[np.flatnonzero(~b)[:40]] = True  # a is right wherever b is, and 40 times more
    same = paired_difference(a, b)
    shuffled = paired_difference(rng.permutation(a), b)
    assert same.difference == pytest.approx(0.08) and same.above and same.p_value < 1e-6
    assert same.ci95[1] - same.ci95[0] < 0.6 * (shuffled.ci95[1] - shuffled.ci95[0])
    assert paired_difference(b, a).below


def test_paired_difference_matches_the_normal_interval():
    a = np.array([1] * 120 + [0] * 60 + [1] * 100 + [0] * 120, bool)
    b = np.array([0] * 120 + [1] * 60 + [1] * 100 + [0] * 120, bool)
    r = paired_difference(a, b)
    half = 1.96 * np.std(a.astype(float) - b.astype(float)) / np.sqrt(400)
    assert r.ci95 == pytest.approx((0.15 - half, 0.15 + half), abs=0.006)
    assert r == paired_difference(a, b)


def test_paired_difference_needs_the_same_samples():
    with pytest.raises(ValueError, match="equally long"):
        paired_difference([1, 0], [1])
