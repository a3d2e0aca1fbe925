"""Differences between variants of a study, paired by seed, with their intervals and corrected tests.

S seeds, N test samples of a suite, R resamples. All accuracies and differences are fractions. ``low, high`` is
Student's t over the S paired differences, by which verdicts go; ``boot_low, boot_high`` draws seeds and test samples
again, and is too narrow with few seeds. Tests are corrected after Holm within a family: all comparisons of one kind,
regime, mode and outcome. Tests of equivalence and minimum detectable differences are at the level of the family's first
step, 5 % / family. The reasons are in docs/study_report.md.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import product

import numpy as np

from vjepa_fast.evaluation.run.rows import Row
from vjepa_fast.study.power import ALPHA, MARGIN, equivalence_p, smallest_detectable
from vjepa_fast.study.records import BASELINE, RANDOM, Study, is_fewshot
from vjepa_fast.study.run.variants import COUNTED, OTHER_METHODS

RESAMPLES = 2000
MEAN = "mean of V-JEPA variants"  # baseline included, other methods not
STUDENT = ", student"
VERDICTS = ("above", "below", "equivalent", "undecided", "not judged")
KINDS = {
    "baseline": "variant minus baseline",
    "random": "variant minus random init",
    "regime": "mixed minus single",
    "mode": "published minus intended",
    "control": "fwm_hw_ld minus fwm_hw",
}


@dataclass(frozen=True)
class Comparison:
    """One paired difference. ``deltas``: one per seed. None where a figure is not computable, ``note`` says why."""

    kind: str  # one of KINDS
    variant: str
    regime: str
    compat: str
    suite: str
    probe: str
    against: str  # what is subtracted
    levels: tuple[float, float]  # mean accuracies over the seeds, of the variant and of what is subtracted
    seeds: tuple[int, ...]
    deltas: tuple[float, ...]
    value: float  # mean over seeds
    low: float | None = None  # 95 % t interval over seeds
    high: float | None = None
    p: float | None = None  # paired t test, two-sided
    p_holm: float | None = None
    family: int = 1  # comparisons that p_holm is corrected for
    boot_low: float | None = None
    boot_high: float | None = None
    note: str = ""
    margin: float = MARGIN  # of equivalence
    detectable: float | None = None  # minimum detectable difference at 5 % / family with a power of 80 %
    p_equal: float | None = None  # of the test of equivalence, corrected
    barred: str = ""  # why nothing on this outcome counts as a finding

    @property
    def outcome(self) -> tuple[str, str]:
        """(suite, probe)."""
        return self.suite, self.probe

    @property
    def verdict(self) -> str:
        """By the corrected tests at 5 %: one of VERDICTS. A difference that is there and within the margin is above or
        below; ``not judged`` where the outcome is barred.
        """
        if self.barred:
            return "not judged"
        if self.p_holm is not None and self.p_holm < ALPHA:
            return "above" if self.value > 0 else "below"
        return "equivalent" if self.within_margin else "undecided"

    @property
    def decided(self) -> bool:
        """Whether there is a difference, as far as this study can tell."""
        return self.verdict in ("above", "below")

    @property
    def within_margin(self) -> bool:
        """Whether the difference is smaller than the margin, by the corrected test of equivalence."""
        return self.p_equal is not None and self.p_equal < ALPHA


def paired_t(deltas: Sequence[float]) -> tuple[float, float | None, float | None, float | None, str]:
    """(mean, low, high, p, note) of paired differences float ``[S]``: 95 % interval and two-sided t test, df = S - 1.

    None where they cannot be computed: one seed; or the same non-zero difference in every seed, whose spread of 0 would
    give an interval of no width. All zero is p = 1. Raises ValueError for no or non-finite differences.
    """
    from scipy import stats

    d = np.asarray(deltas, dtype=np.float64).reshape(-1)
    if d.size == 0 or not np.isfinite(d).all():
        raise ValueError(f"need finite differences of at least one seed, got {d.tolist()}")
    mean = float(d.mean())
    if d.size == 1:
        return mean, None, None, None, "one seed: no interval over seeds"
    if np.ptp(d) < 1e-12:
        if abs(mean) < 1e-12:
            return 0.0, 0.0, 0.0, 1.0, "no difference in any seed"
        return mean, None, None, None, "the same difference in every seed: no spread to test against"
    test = stats.ttest_1samp(d, 0.0)
    interval = test.confidence_interval(1 - ALPHA)
    p = test.pvalue  # pyright: ignore[reportAttributeAccessIssue]  # scipy has no types
    return mean, float(interval.low), float(interval.high), float(p), ""


def holm(p_values: Sequence[float | None], family: int | None = None) -> list[float | None]:
    """Holm's step-down correction (Holm 1979): adjusted p-values in the order given, None stays None.

    ``family`` (at least the number of values, its default) counts comparisons that were planned but have no value as
    well: they take the largest ranks, as if their p were 1.
    """
    m = len(p_values) if family is None else family
    if m < len(p_values):
        raise ValueError(f"a family of {m} cannot have {len(p_values)} comparisons")
    out: list[float | None] = [None] * len(p_values)
    running = 0.0
    known = sorted((p, i) for i, p in enumerate(p_values) if p is not None)
    for rank, (p, i) in enumerate(known):
        running = max(running, min(1.0, (m - rank) * p))
        out[i] = running
    return out


@lru_cache(maxsize=64)
def _draws(seeds: int, samples: int, resamples: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """How often each seed [R,S] and each sample [R,N] is drawn."""
    rng = np.random.default_rng([seed, seeds, samples])
    drawn = [rng.multinomial(n, np.full(n, 1 / n), size=resamples).astype(np.float32) for n in (seeds, samples)]
    return drawn[0], drawn[1]


def bootstrap(
    differences: np.ndarray, value: float | None = None, *, resamples: int = RESAMPLES, seed: int = 0
) -> tuple[float, float]:
    """95 % interval of the mean of ``differences`` float ``[S, N]`` (NaN: no value), seeds and samples drawn again.

    Every drawn seed is measured on the same drawn samples (Owen 2007, "The pigeonhole bootstrap"). One seed: over
    samples alone. ``value`` shifts the interval to that centre (an accuracy over episodes is not the plain mean of its
    samples). Raises ValueError where there is no value at all.
    """
    d = np.asarray(differences, dtype=np.float64)
    known = np.isfinite(d)
    if d.ndim != 2 or not known.any():
        raise ValueError(f"need differences [seeds, samples] with at least one value, got shape {d.shape}")
    seeds_RS, samples_RN = _draws(*d.shape, resamples, seed)
    totals_RS = samples_RN @ np.where(known, d, 0).T
    counts_RS = np.full_like(totals_RS, d.shape[1]) if known.all() else samples_RN @ known.T.astype(np.float64)
    total, count = (seeds_RS * totals_RS).sum(1), (seeds_RS * counts_RS).sum(1)
    means = total[count > 0] / count[count > 0]
    low, high = np.quantile(means, [ALPHA / 2, 1 - ALPHA / 2])
    shift = 0.0 if value is None else value - d[known].mean()
    return float(low + shift), float(high + shift)


Rows = dict[int, Row]  # by seed
Outcome = tuple[str, str]  # suite, probe


def _rows(study: Study, variant: str, regime: str, compat: str, outcome: Outcome) -> Rows:
    return {s: c.rows[outcome] for s, c in study.runs(variant, regime, compat).items() if outcome in c.rows}


def _gaps(a: Row, b: Row) -> np.ndarray:
    """Difference per test sample float [N], NaN where one has none."""
    return np.array([np.nan if x is None or y is None else x - y for x, y in zip(a.hits, b.hits)], dtype=np.float64)


def _level(sides: Iterable[Rows], seeds: Sequence[int]) -> float:
    return float(np.mean([rows[s].accuracy for rows in sides for s in seeds]))


def _comparison(kind: str, seeds: tuple[int, ...], deltas: Sequence[float], samples: list, **identity) -> Comparison:
    mean, low, high, p, note = paired_t(deltas)
    d = np.array(samples)
    boot_low, boot_high = bootstrap(d, mean) if d.size and np.isfinite(d).any() else (None, None)
    found = {"low": low, "high": high, "p": p, "boot_low": boot_low, "boot_high": boot_high, "note": note}
    return Comparison(kind=kind, seeds=seeds, deltas=tuple(deltas), value=mean, **found, **identity)


def _compared(
    kind: str, sides: Mapping[str, tuple[Rows, Rows]], place: tuple[str, str], outcome: Outcome, against: str
) -> list[Comparison]:
    """First minus second rows of each name at a place (regime, compat), over the seeds that both have, if any."""
    out = []
    for name, (a, b) in sides.items():
        if seeds := tuple(sorted(set(a) & set(b))):
            deltas = [a[s].accuracy - b[s].accuracy for s in seeds]
            identity = {**_identity(place, outcome), "levels": (_level([a], seeds), _level([b], seeds))}
            samples = [_gaps(a[s], b[s]) for s in seeds]
            out.append(_comparison(kind, seeds, deltas, samples, variant=name, against=against, **identity))
    return out


def _identity(place: tuple[str, str], outcome: Outcome) -> dict:
    return dict(zip(("regime", "compat", "suite", "probe"), (*place, *outcome)))


def _corrected(found: Sequence[Comparison], planned: int) -> list[Comparison]:
    """The comparisons, corrected in a family of at least ``planned``."""
    m = max(planned, len(found))
    return [replace(c, p_holm=p, family=m) for c, p in zip(found, holm([c.p for c in found], m))]


def _standing_in(study: Study, variant: str, regime: str, compat: str) -> tuple[str, str]:
    """(mode in which a variant is subtracted, what it is called then): intended where it did not run in ``compat``."""
    own = compat if study.runs(variant, regime, compat) else study.compat
    return own, variant if own == compat else f"{variant}, {own}"


def _against(
    study: Study, kind: str, reference: str, variants: Sequence[str] = ()
) -> Iterator[tuple[list[str], list[Comparison]]]:
    """(variants planned, comparisons) per regime, mode and outcome of ``variants`` (default: all others) minus one."""
    for place in product(study.regimes, study.compats):
        own, against = _standing_in(study, reference, *place)
        planned = [v for v in variants or study.planned(place) if v != reference]
        for outcome in study.outcomes:
            base = _rows(study, reference, place[0], own, outcome)
            sides = {v: (_rows(study, v, *place, outcome), base) for v in planned}
            yield planned, _compared(kind, sides, place, outcome, against)


def to_baseline(study: Study) -> list[Comparison]:
    """Each variant minus the baseline of its regime and mode, per outcome. Where the baseline did not run in a mode,
    the intended one is subtracted, and ``against`` names it. Counted variants are corrected among themselves (18 in a
    full study), any other over all planned ones; those without a result count.
    """
    out = []
    for planned, found in _against(study, "baseline", BASELINE):
        counted = _corrected([c for c in found if c.variant in COUNTED], sum(v in COUNTED for v in planned))
        others = [c for c in _corrected(found, len(planned)) if c.variant not in COUNTED]
        out += sorted(counted + others, key=lambda c: planned.index(c.variant))
    return out


def to_random(study: Study) -> list[Comparison]:
    """Each variant, baseline included, minus the random-init encoder of the same seed."""
    return [c for planned, found in _against(study, "random", RANDOM) for c in _corrected(found, len(planned))]


def to_control(study: Study, variant: str = "fwm_hw_ld", control: str = "fwm_hw") -> list[Comparison]:
    """The headline variant minus the same without its latent-dynamics term (the control the paper lacks), per mode.
    Where the control ran in one mode only, that one is subtracted. One comparison per family: nothing to correct.
    """
    return [c for _, found in _against(study, "control", control, [variant]) for c in _corrected(found, 1)]


def mixed_minus_single(study: Study) -> list[Comparison]:
    """The study's question: mixed minus single pretraining per variant (baseline included), corrected over the variants
    of an outcome; and their mean, one difference per seed (the mean over the variants of V-JEPA that ran both regimes
    in every seed), which is one test and needs no correction.
    """
    out = []
    for compat in study.compats if {"single", "mixed"} <= set(study.regimes) else ():
        mixed, single = ("mixed", compat), ("single", compat)
        planned = study.planned(mixed, single)
        ran = [v for v in planned if study.runs(v, *mixed) and study.runs(v, *single)]
        for outcome in study.outcomes:
            sides = {v: (_rows(study, v, *mixed, outcome), _rows(study, v, *single, outcome)) for v in ran}
            out += _corrected(_compared("regime", sides, mixed, outcome, "single"), len(planned))
            averaged = [side for v, side in sides.items() if v not in OTHER_METHODS]
            if len(averaged) > 1:
                out += _mean(averaged, _identity(mixed, outcome))
    return out


def _mean(sides: Sequence[tuple[Rows, Rows]], identity: dict) -> list[Comparison]:
    """Mean over variants of mixed minus single, by seed; only seeds that every variant has in both regimes, if any."""
    seeds = tuple(sorted(set.intersection(*(set(rows) for side in sides for rows in side))))
    if not seeds:
        return []
    deltas = [float(np.mean([a[s].accuracy - b[s].accuracy for a, b in sides])) for s in seeds]
    samples = [np.mean([_gaps(a[s], b[s]) for a, b in sides], axis=0) for s in seeds]
    levels = _level((a for a, _ in sides), seeds), _level((b for _, b in sides), seeds)
    made = _comparison("regime", seeds, deltas, samples, variant=MEAN, against="single", levels=levels, **identity)
    return [replace(made, p_holm=made.p, family=1, note=made.note or f"{len(sides)} variants")]


def published_minus_intended(study: Study) -> list[Comparison]:
    """What the published code's departures change: each variant that ran in both modes, corrected over those. A variant
    whose published target never trains has a second line, ``<variant>, student``: the encoder that did train.
    """
    out = []
    for regime in study.regimes:
        place = (regime, "published")
        both = study.planned((regime, "intended"), place)
        for outcome in study.outcomes:
            intended = {v: _rows(study, v, regime, "intended", outcome) for v in both}
            sides = {v: (_rows(study, v, *place, outcome), intended[v]) for v in both}
            for v in both:
                cells = study.runs(v, *place).items()
                students = {s: c.student_rows[outcome] for s, c in cells if outcome in c.student_rows}
                sides[v + STUDENT] = students, intended[v]
            out += _corrected(_compared("mode", sides, place, outcome, "intended"), len(both))
    return out


def judged(c: Comparison, margin: float = MARGIN, barred: str = "") -> Comparison:
    """The comparison with its minimum detectable difference and its test of equivalence within ``+-margin``, both at
    5 % / family (the first step of Holm's correction). ``barred``: why it counts for no finding, if it does not.
    """
    p = equivalence_p(c.deltas, margin)
    return replace(
        c,
        margin=margin,
        detectable=smallest_detectable(c.deltas, ALPHA / c.family),
        p_equal=None if p is None else min(1.0, c.family * p),
        barred=barred,
    )


def all_comparisons(study: Study, margin: float = MARGIN, barred: Mapping[str, str] = {}) -> list[Comparison]:
    """Everything the report states, in one list. ``barred``: by suite, why its outcomes count for no finding."""
    every = (mixed_minus_single, to_baseline, to_control, published_minus_intended, to_random)
    return [judged(c, margin, barred.get(c.suite, "")) for compare in every for c in compare(study)]


def answer(comparisons: Sequence[Comparison], compat: str) -> dict:
    """The answer as numbers: {"mean", "baseline": [Comparison], "variants": {outcome: {"of": n, verdict: names}}}."""
    asked = [c for c in comparisons if c.kind == "regime" and c.compat == compat and is_fewshot(c.outcome)]
    variants: dict[Outcome, dict] = {}
    for c in asked:
        if c.variant != MEAN:
            counted = variants.setdefault(c.outcome, {"of": 0, **{v: [] for v in VERDICTS}})
            counted["of"] += 1
            counted[c.verdict].append(c.variant)
    mean, baseline = ([c for c in asked if c.variant == name] for name in (MEAN, BASELINE))
    return {"mean": mean, "baseline": baseline, "variants": variants}
