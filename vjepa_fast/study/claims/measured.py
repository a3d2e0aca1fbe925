"""The claims computed again from one's own study (``vjepa-fast study run``), beside the published figures.

A study that measured the paper's data sets is read as it is; a synthetic one has stand-ins for them (``STAND_INS``),
which can bear out which way an accuracy moves, not by how many points. So the direction is what is judged, on either:
*confirmed*, every 95 % interval over seeds lies wholly on the claimed side of zero; *contradicted*, one lies wholly on
the other side; *open*, neither, or one seed only; *not measured*.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass

from vjepa_fast.study.claims.evaluate import CONFIRMED, CONTRADICTED, NAMES, Claim
from vjepa_fast.study.claims.published import Published
from vjepa_fast.study.records import BASELINE, Study, load_study
from vjepa_fast.study.stats import paired_t

OPEN, NOT_MEASURED = "open", "not measured"
STAND_INS = {
    "imagenet100": ("objects", "appearance"),
    "ssv2": ("order", "temporal"),
    "diving48": ("motion8", "temporal"),
    "synth": ("motion8", "temporal"),
}
REGIMES = {"ucf101": "single", "mixed": "mixed"}
PROBE = "linear"
STUDY_TEXT = (
    f"Judged by direction, {PROBE} probe: confirmed where every 95 % interval over seeds lies wholly on the claimed "
    "side of zero, contradicted where one lies wholly on the other, open otherwise; not corrected for the number of "
    "claims, nor of the differences within one."
)


@dataclass(frozen=True)
class SeedDelta:
    """A variant minus the baseline on one suite, in points: each seed's pair of accuracies in percent, the mean of the
    differences and its 95 % interval (None: one seed, or no spread).
    """

    method: str
    dataset: str  # the paper's
    suite: str  # the study's
    pairs: dict[int, tuple[float, float]]  # seed -> (variant, baseline)
    value: float
    low: float | None
    high: float | None
    compat: str
    baseline: str  # the mode that the baseline ran in: compat, or intended in its place
    untrained: bool = False  # the published code evaluates a target left at its random start

    @property
    def name(self) -> str:
        """Such as ``ld on order``, with what is unusual about the comparison."""
        against = "" if self.baseline == self.compat else ", against the intended baseline"
        return f"{self.method}{', its target never trained,' if self.untrained else ''} on {self.suite}{against}"

    @property
    def direction(self) -> str:
        """up, down or open, by the interval."""
        if self.low is None or self.high is None or self.low <= 0 <= self.high:
            return OPEN
        return "up" if self.low > 0 else "down"

    @property
    def interval(self) -> str:
        """Such as ``+6.00 (+3.52 to +8.48)``."""
        if self.low is None:
            return f"{self.value:+.2f} (no interval from {len(self.pairs)} seed{'s' if len(self.pairs) > 1 else ''})"
        return f"{self.value:+.2f} ({self.low:+.2f} to {self.high:+.2f})"

    @property
    def arithmetic(self) -> str:
        """Each seed's difference, and their mean with its interval."""
        seeds = "; ".join(f"seed {s}: {a:.2f} - {b:.2f} = {a - b:+.2f}" for s, (a, b) in self.pairs.items())
        return f"{seeds}; mean {self.interval}"


def recompute(folder: str | os.PathLike, claims: Sequence[Claim], published: Published) -> dict[int, list[dict]]:
    """By claim, one dict per mode of the study (intended, published): compat, status, computed, arithmetic, suites.

    An unfinished study is read as far as it went. DataError names a folder, cell or number that cannot be used.
    """
    study = load_study(folder, partial=True)
    modes = study.compats or ("intended",)
    return {claim.id: [measure(study, claim, published, mode) for mode in modes] for claim in claims}


def measure(study: Study, claim: Claim, published: Published, compat: str) -> dict:
    """One claim in one mode of a study."""
    if claim.regime not in REGIMES:
        sized = claim.kind == "embedding_dim"
        why = "a study's encoder has the size that its user chose" if sized else "it names nothing to measure"
        return _result(compat, NOT_MEASURED, (), why)
    regime, found = REGIMES[claim.regime], {}
    methods = published.methods(claim.regime, claim.methods)  # so that a control of the study counts as none of them
    for dataset in claim.datasets:
        suite = suite_of(study, dataset)
        made = [seed_delta(study, m, dataset, suite, regime, compat) for m in methods] if suite else []
        found[dataset] = [x for x in made if x is not None]
    deltas = [x for some in found.values() for x in some]
    names = ", ".join(f"{claim.method} on {suite_of(study, d) or d}" for d, some in found.items() if not some)
    why = f"no cells of {names} with the baseline's of the same seed (regime {regime}, {compat})" if names else ""
    if not deltas:
        return _result(compat, NOT_MEASURED, (), why)
    if claim.kind == "count_below":
        return _count(claim, deltas, compat)
    return _directions(claim, deltas, compat, why)


def suite_of(study: Study, dataset: str) -> str | None:
    """The study's suite for a data set of the paper: itself or its stand-in; None where neither was measured."""
    there = {suite for suite, probe in study.outcomes if probe == PROBE}
    return next((s for s in (dataset, STAND_INS[dataset][0]) if s in there), None)


def seed_delta(study: Study, method: str, dataset: str, suite: str, regime: str, compat: str) -> SeedDelta | None:
    """``method`` minus the baseline over the seeds that both have; None where they share none."""
    own = compat if study.runs(BASELINE, regime, compat) else "intended"
    mine, base = (
        {seed: cell.rows[suite, PROBE].accuracy for seed, cell in cells.items() if (suite, PROBE) in cell.rows}
        for cells in (study.runs(method, regime, compat), study.runs(BASELINE, regime, own))
    )
    pairs = {seed: (100 * mine[seed], 100 * base[seed]) for seed in sorted(set(mine) & set(base))}
    if not pairs:
        return None
    value, low, high, *_ = paired_t([a - b for a, b in pairs.values()])
    untrained = any(cell.student_rows for cell in study.runs(method, regime, compat).values())
    return SeedDelta(method, dataset, suite, pairs, value, low, high, compat, own, untrained)


def wanted(claim: Claim, dataset: str) -> str:
    """The claimed direction on a data set."""
    if claim.directions:
        return claim.directions[dataset]
    ends = claim.value if isinstance(claim.value, list) else [claim.value]
    return "up" if min(ends) > 0 else "down"


def _directions(claim: Claim, deltas: Sequence[SeedDelta], compat: str, lacking: str) -> dict:
    said = [(x.direction, wanted(claim, x.dataset)) for x in deltas]
    if any(found not in (want, OPEN) for found, want in said):
        status = CONTRADICTED
    elif lacking:
        status = NOT_MEASURED
    else:
        status = CONFIRMED if all(found == want for found, want in said) else OPEN
    several = len(deltas) > 1
    text = "; ".join(f"{x.name}: {x.interval if several else x.arithmetic}" for x in deltas)
    return _result(compat, status, deltas, "; ".join(filter(None, (text, lacking))))


def _count(claim: Claim, deltas: Sequence[SeedDelta], compat: str) -> dict:
    """Whether most of the methods lose more than the threshold: the count itself depends on which were run."""
    of = claim.value["of"]
    threshold = 0.0 if any(x.suite != x.dataset for x in deltas) else claim.value["threshold"]
    limit = f"{threshold:+g}" if threshold else "zero (a stand-in has no points to compare)"
    below = [x for x in deltas if x.value < threshold]
    surely = [x for x in deltas if x.high is not None and x.high < threshold]
    surely_not = [x for x in deltas if x.low is not None and x.low >= threshold]
    half = len(deltas) / 2
    status = OPEN
    if len(deltas) >= of:
        status = CONFIRMED if len(surely) > half else CONTRADICTED if len(surely_not) >= half else OPEN
    text = (
        f"{len(below)} of {len(deltas)} methods below {limit} on average, {len(surely)} with their whole "
        f"interval, {len(surely_not)} above it with theirs"
        + ("" if len(deltas) >= of else f"; the claim is about {of} methods, {len(deltas)} were run")
        + "".join(f"; {x.name}: {x.interval}" for x in deltas)
    )
    return _result(compat, status, deltas, text)


def _result(compat: str, status: str, deltas: Sequence[SeedDelta], text: str) -> dict:
    computed = [
        {
            **{k: getattr(x, k) for k in ("method", "dataset", "suite", "baseline")},
            "stand_in": x.suite != x.dataset,
            "seeds": list(x.pairs),
            "delta": round(x.value, 4),
            **{k: None if end is None else round(end, 4) for k, end in (("low", x.low), ("high", x.high))},
        }
        for x in deltas
    ]
    return {"compat": compat, "status": status, "computed": computed or None, "arithmetic": text}


def mapping_text() -> list[str]:
    """How a synthetic study stands in for the paper's data sets, one line each."""
    lines = [f"{NAMES[d]}: {suite} ({axis})" for d, (suite, axis) in STAND_INS.items()]
    return [*lines, "UCF-101 alone: regime single; the mixture: regime mixed"]
