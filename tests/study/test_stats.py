"""Intervals and tests of a study: hand-computed values, scipy's own, and simulation."""

import numpy as np
import pytest
from scipy import stats as scipy_stats

from tests.study.fake_study import study_of
from vjepa_fast.study import power, stats

LINEAR = (("motion8", "linear"),)


def test_paired_t_by_hand():
    # deltas 1, 2, 3: mean 2, sd 1, se 1/sqrt(3), t(df 2, 97.5 %) = 4.302653, t = 2 sqrt(3)
    mean, low, high, p, note = stats.paired_t([0.01, 0.02, 0.03])
    half = 4.302652729911275 * 0.01 / np.sqrt(3)
    assert mean == pytest.approx(0.02)
    assert (low, high) == (pytest.approx(0.02 - half), pytest.approx(0.02 + half))
    assert p == pytest.approx(2 * scipy_stats.t.sf(2 * np.sqrt(3), 2)) and note == ""


def test_paired_t_is_the_test_of_two_paired_samples():
    rng = np.random.default_rng(0)
    a, b = rng.random(7), rng.random(7)
    assert stats.paired_t(a - b)[3] == pytest.approx(scipy_stats.ttest_rel(a, b).pvalue)


@pytest.mark.parametrize(
    ("deltas", "expected", "said"),
    [
        ([0.1], (0.1, None, None, None), "one seed"),
        ([0.1, 0.1, 0.1], (0.1, None, None, None), "same difference"),
        ([0.0, 0.0], (0.0, 0.0, 0.0, 1.0), "no difference"),
    ],
)
def test_paired_t_says_what_it_cannot_compute(deltas, expected, said):
    *found, note = stats.paired_t(deltas)
    assert tuple(found) == pytest.approx(expected) and said in note


@pytest.mark.parametrize("deltas", [[], [0.1, float("nan")]])
def test_paired_t_refuses_no_number(deltas):
    with pytest.raises(ValueError, match="finite"):
        stats.paired_t(deltas)


def test_holm_by_hand():
    # sorted .005 .01 .03 .04 times 4 3 2 1 = .02 .03 .06 .04 -> the last is raised to .06
    assert stats.holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    # a family of 18 of which one has a value: Bonferroni
    assert stats.holm([0.002], 18) == pytest.approx([0.036])
    # not computable stays so, and still counts
    assert stats.holm([None, 0.02], 2) == [None, pytest.approx(0.04)]
    with pytest.raises(ValueError, match="family"):
        stats.holm([0.1, 0.2], 1)


def test_smallest_detectable_difference_is_that_of_the_noncentral_t():
    """Published tables of power: n = 10 pairs find d = 1.00 (two-sided, 5 %) with 80.3 % (Cohen); and scipy's own."""
    assert power.detection_power(np.sqrt(10), 10) == pytest.approx(0.803, abs=1e-3)
    for seeds, alpha in ((3, 0.05), (5, 0.05 / 6), (30, 0.05)):
        shift = power._needed(seeds, alpha, 0.8)
        critical = scipy_stats.t.ppf(1 - alpha / 2, seeds - 1)
        own = scipy_stats.nct.sf(critical, seeds - 1, shift) + scipy_stats.nct.cdf(-critical, seeds - 1, shift)
        assert own == pytest.approx(0.8, abs=1e-5)
    deltas = [0.01, 0.02, 0.03]  # sd 0.01
    assert power.smallest_detectable(deltas) == pytest.approx(5.6533 * 0.01 / np.sqrt(3), rel=1e-3)
    assert power.smallest_detectable(deltas, 0.05 / 18) > 4 * power.smallest_detectable(deltas)
    assert power.smallest_detectable([0.1]) is None and power.smallest_detectable([0.1, 0.1]) is None
    with pytest.raises(ValueError, match="at least 2"):
        power.detection_power(1.0, 1)


def test_the_detectable_difference_is_found_in_80_percent_of_studies():
    rng = np.random.default_rng(5)
    true = power._needed(4, 0.05, 0.8) * 0.02 / np.sqrt(4)
    deltas = rng.normal(true, 0.02, (4000, 4))
    found = scipy_stats.ttest_1samp(deltas, 0, axis=1).pvalue < 0.05
    assert found.mean() == pytest.approx(0.8, abs=0.02)


def test_equivalence_is_the_90_percent_interval_within_the_margin():
    rng = np.random.default_rng(6)
    for deltas in rng.normal(0.005, 0.008, (50, 4)):
        test = scipy_stats.ttest_1samp(deltas, 0.0).confidence_interval(0.9)
        inside = test.low > -0.02 and test.high < 0.02
        assert (power.equivalence_p(deltas, 0.02) < 0.05) == inside
    a, b = (scipy_stats.ttest_1samp(deltas, x, alternative=w).pvalue for x, w in ((-0.02, "greater"), (0.02, "less")))
    assert power.equivalence_p(deltas, 0.02) == pytest.approx(max(a, b))
    assert power.equivalence_p([0.0, 0.0]) == 0.0 and power.equivalence_p([0.1, 0.1]) is None
    assert power.equivalence_p([0.0]) is None
    with pytest.raises(ValueError, match="margin"):
        power.equivalence_p([0.0, 0.1], 0)


def test_a_difference_at_the_margin_is_called_equivalent_in_5_percent():
    rng = np.random.default_rng(7)
    p = [power.equivalence_p(d, 0.02) for d in rng.normal(0.02, 0.004, (1000, 4))]
    assert 0.03 <= np.mean(np.array(p) < 0.05) <= 0.07


def test_verdicts():
    near, far = (0.001, 0.002, 0.0), (0.1, 0.101, 0.102)
    identity = {"variant": "ld", "regime": "mixed", "compat": "intended", "suite": "s", "probe": "knn", "against": "x"}

    def verdict(deltas, family=1, **options):
        mean, low, high, p, note = stats.paired_t(deltas)
        p_holm = None if p is None else min(1.0, family * p)
        found = {"low": low, "high": high, "p": p, "p_holm": p_holm, "family": family, "note": note}
        seeds = tuple(range(len(deltas)))
        c = stats.Comparison(kind="regime", levels=(0, 0), seeds=seeds, deltas=deltas, value=mean, **found, **identity)
        return stats.judged(c, **options)

    assert verdict(far).verdict == "above" and verdict(tuple(-d for d in far)).verdict == "below"
    assert verdict(near).verdict == "equivalent" and verdict(near, margin=0.002).verdict == "undecided"
    assert verdict(near, family=1000).verdict == "undecided"  # equivalence is corrected as well
    assert verdict(far, barred="no check").verdict == "not judged" and not verdict(far, barred="no check").decided
    assert verdict((0.004, 0.004, 0.0041)).verdict == "above" and verdict((0.004, 0.004, 0.0041)).within_margin
    assert verdict((0.0, 0.0)).verdict == "equivalent" and verdict((0.1,)).verdict == "undecided"
    assert verdict(far, family=6).detectable > verdict(far).detectable and verdict((0.1,)).detectable is None


def test_t_interval_covers_and_corrected_tests_keep_their_level():
    """18 variants beside one baseline, 3 and 5 seeds: coverage 93 to 97 %, a false finding in 5 % of families."""
    rng, times, effect = np.random.default_rng(1), 400, 0.03
    for seeds in (3, 5):
        covered, false = [], 0
        for _ in range(times):
            baseline = rng.normal(0.5, 0.02, seeds)
            deltas = rng.normal(0.5 + effect, 0.02, (18, seeds)) - baseline
            found = [stats.paired_t(d) for d in deltas[:6]]
            covered += [low <= effect <= high for _, low, high, *_ in found]
            null = scipy_stats.ttest_1samp(deltas - effect, 0, axis=1).pvalue
            false += min(stats.holm(null.tolist())) < 0.05
        assert 0.93 <= np.mean(covered) <= 0.97
        assert false / times <= 0.06  # nominal 0.05, standard error 0.011; the shared baseline makes it smaller


def test_bootstrap_covers_where_clips_and_seeds_both_vary():
    """Coverage for a population of clips and seeds; drawing clips anew in each seed would be far too narrow here."""
    rng, times, hit, nested_hit = np.random.default_rng(2), 300, 0, 0
    for _ in range(times):
        clip, seed = rng.normal(0, 1, 60), rng.normal(0, 0.1, 10)
        d = seed[:, None] + clip + rng.normal(0, 0.3, (10, 60))
        low, high = stats.bootstrap(d, resamples=400)
        hit += low <= 0 <= high
        half = 1.96 * np.sqrt(d.mean(1).var() / 10 + d.var(1).mean() / 600)  # of clips drawn within each seed
        nested_hit += abs(d.mean()) <= half
    assert 0.92 <= hit / times <= 0.98
    assert nested_hit / times < 0.7


def test_bootstrap_by_hand():
    # one seed, samples 0 and 1: a resample's mean is 0, 1/2 or 1 with probability 1/4, 1/2, 1/4
    assert stats.bootstrap(np.array([[0.0, 1.0]])) == (0.0, 1.0)
    # seeds alone vary: three seeds 0, 0, 3 -> all three drawn zero has probability 8/27, all three 3 1/27
    assert stats.bootstrap(np.array([[0.0] * 4, [0.0] * 4, [3.0] * 4])) == (0.0, pytest.approx(3.0))
    # samples without a value change nothing but their weight, and the centre can be moved
    with_gaps = np.array([[0.0, np.nan, 1.0, np.nan]])
    assert stats.bootstrap(with_gaps, 0.75) == (0.25, 1.25)
    with pytest.raises(ValueError, match="at least one"):
        stats.bootstrap(np.full((2, 3), np.nan))


@pytest.mark.parametrize("regime", ["single", "mixed"])
def test_planted_effect_is_found_and_nothing_else(tmp_path, regime):
    """+10 points with 5 seeds are above after correction over 18; the 17 others of no effect are not."""
    study = study_of(
        tmp_path,
        variants=("baseline", *stats.COUNTED),
        regimes=("single", "mixed"),
        seeds=range(5),
        outcomes=LINEAR,
        samples=2000,
        effects={("ld", "single", "motion8"): 0.10, ("ld", "mixed", "motion8"): 0.10},
        rng=3,
    )
    found = {c.variant: c for c in stats.to_baseline(study) if c.regime == regime}
    assert len(found) == 18 and {c.family for c in found.values()} == {18}
    assert found["ld"].verdict == "above" and found["ld"].low > 0 and found["ld"].boot_low > 0
    assert found["ld"].value == pytest.approx(0.10, abs=0.03)
    assert [v for v, c in found.items() if c.verdict != "undecided"] == ["ld"]


def test_null_variants_are_undecided_in_94_percent_of_studies():
    """Whole studies without an effect, through the same code as the report: families with any finding are rare."""
    from vjepa_fast.evaluation.run.rows import Row
    from vjepa_fast.study.records import Cell, Study, cell_key

    rng, families, false = np.random.default_rng(4), 0, 0
    variants = ("baseline", *stats.COUNTED)
    for _ in range(120):
        cells = {}
        for v in variants:
            for s in range(3):
                row = Row(v, "pretrained", "motion8", "linear", 0.5 + rng.normal(0, 0.02), 0, 1, 10, 0.1)
                key = cell_key(v, "mixed", "intended", s)
                cells[key] = Cell(key, v, "mixed", "intended", s, "pretrained", {LINEAR[0]: row})
        found = stats.to_baseline(Study(None, {"variants": variants}, cells, tuple(cells)))
        families, false = families + 1, false + any(c.verdict != "undecided" for c in found)
    assert false / families <= 0.06


def test_mixed_minus_single_and_its_mean(tmp_path):
    study = study_of(
        tmp_path,
        variants=("baseline", "ld", "hw"),
        seeds=range(5),
        samples=1500,
        seed_spread=0.005,
        outcomes=(("fewshot", "1-shot"), ("objects", "linear")),
        effects={(v, "mixed", "fewshot"): 0.06 for v in ("baseline", "ld", "hw")},
    )
    found = {(c.variant, c.suite): c for c in stats.mixed_minus_single(study)}
    mean = found[stats.MEAN, "fewshot"]
    assert mean.verdict == "above" and mean.family == 1 and mean.value == pytest.approx(0.06, abs=0.02)
    by_variant = [found[v, "fewshot"] for v in ("baseline", "ld", "hw")]
    assert mean.deltas == pytest.approx(np.mean([c.deltas for c in by_variant], axis=0))
    assert {c.family for c in by_variant} == {3} and all(c.verdict == "above" for c in by_variant)
    assert found[stats.MEAN, "objects"].verdict == "undecided"
    with_others = study_of(
        tmp_path / "others",
        variants=("baseline", "ld", "pixels", "levjepa"),
        outcomes=LINEAR,
        effects={("pixels", "mixed", "motion8"): 0.3},
    )
    others = {c.variant: c for c in stats.mixed_minus_single(with_others)}
    assert set(others) == {"baseline", "ld", "pixels", "levjepa", stats.MEAN} and others["pixels"].family == 4
    assert others[stats.MEAN].deltas == pytest.approx(np.mean([others[v].deltas for v in ("baseline", "ld")], axis=0))
    said = stats.answer(list(found.values()), "intended")
    none = {v: [] for v in stats.VERDICTS}
    assert said["variants"] == {("fewshot", "1-shot"): {"of": 3, **none, "above": ["baseline", "ld", "hw"]}}


def test_deltas_are_paired_by_seed(tmp_path):
    study = study_of(tmp_path, variants=("baseline", "ld"), outcomes=LINEAR, seeds=(0, 3), regimes=("single",))
    (found,) = stats.to_baseline(study)
    cells = study.cells
    for seed, delta in zip(found.seeds, found.deltas):
        a, b = (cells[f"{v}-single-intended-s{seed}"].rows[LINEAR[0]].accuracy for v in ("ld", "baseline"))
        assert delta == pytest.approx(a - b)
    assert found.seeds == (0, 3)
    randoms = {c.variant: c for c in stats.to_random(study)}
    control = [cells[f"random_init-none-intended-s{s}"].rows[LINEAR[0]].accuracy for s in (0, 3)]
    mine = [cells[f"baseline-single-intended-s{s}"].rows[LINEAR[0]].accuracy for s in (0, 3)]
    assert randoms["baseline"].deltas == pytest.approx(np.subtract(mine, control)) and randoms["ld"].family == 2


def test_modes_control_and_stand_in_baseline(tmp_path):
    study = study_of(
        tmp_path,
        variants=("baseline", "fwm_hw", "fwm_hw_ld"),
        published=("fwm_hw_ld",),
        outcomes=LINEAR,
        seeds=(0, 1),
        regimes=("single",),
    )
    (mode,) = stats.published_minus_intended(study)
    assert (mode.variant, mode.against, mode.family) == ("fwm_hw_ld", "intended", 1)
    control = {c.compat: c.against for c in stats.to_control(study)}
    assert control == {"intended": "fwm_hw", "published": "fwm_hw, intended"}
    against = {(c.variant, c.compat): (c.against, c.family) for c in stats.to_baseline(study)}
    assert against == {
        ("fwm_hw", "intended"): ("baseline", 2),  # a control is corrected over all, the counted among themselves
        ("fwm_hw_ld", "intended"): ("baseline", 1),
        ("fwm_hw_ld", "published"): ("baseline, intended", 1),
    }


def test_one_seed_gives_no_verdict_and_says_so(tmp_path):
    study = study_of(tmp_path, variants=("baseline", "ld"), seeds=(0,), outcomes=LINEAR, effects={"ld": 0.2})
    found = [c for c in stats.all_comparisons(study) if c.variant == "ld"]
    assert found and all(c.verdict == "undecided" and c.low is None and "one seed" in c.note for c in found)
    assert all(c.boot_low is not None for c in found)


def test_a_planned_variant_that_did_not_run_still_counts(tmp_path):
    from vjepa_fast.study.records import load_study

    study = study_of(tmp_path, variants=("baseline", "ld", "hw", "fwm"), outcomes=LINEAR, regimes=("single",))
    for seed in (0, 1, 2):
        (tmp_path / "cells" / f"fwm-single-intended-s{seed}.json").unlink()
    study = load_study(tmp_path, partial=True)
    found = stats.to_baseline(study)
    assert [c.variant for c in found] == ["ld", "hw"] and {c.family for c in found} == {3}


def test_families_are_those_of_the_plan_in_a_regime_and_mode(tmp_path):
    """A variant that the plan has in the published mode alone does not widen the intended family, nor the reverse."""
    from tests.study.fake_study import make_study
    from vjepa_fast.study.records import load_study

    make_study(tmp_path, variants=("baseline", "ld"), published=("hw", "ac"), outcomes=LINEAR, regimes=("single",))
    for seed in (0, 1, 2):
        (tmp_path / "cells" / f"ac-single-published-s{seed}.json").unlink()
    study = load_study(tmp_path, partial=True)
    families = {(c.variant, c.compat): c.family for c in stats.to_baseline(study)}
    assert families == {("ld", "intended"): 1, ("hw", "published"): 2}  # ac is planned there and did not run
    assert {(c.variant, c.compat): c.family for c in stats.to_random(study)} == {
        ("baseline", "intended"): 2,
        ("ld", "intended"): 2,
        ("hw", "published"): 2,
    }
