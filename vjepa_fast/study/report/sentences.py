"""The findings of a study in words, and its numbers as text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from vjepa_fast.study.power import ALPHA
from vjepa_fast.study.records import RANDOM, Study, is_fewshot
from vjepa_fast.study.report import tables
from vjepa_fast.study.stats import VERDICTS, Comparison

NEAR = 0.01  # of chance


def points(value: float | None, digits: int = 1) -> str:
    """0.0123 as "+1.2" (percentage points); None as "n/a"."""
    if value is None:
        return "n/a"
    text = f"{100 * value:+.{digits}f}"  # -0.0 and +0.0 are 0.0
    return f"{0:.{digits}f}" if float(text) == 0 else text


def span(low: float | None, high: float | None) -> str:
    """An interval in points: "-1.2 to +3.4"."""
    return "n/a" if low is None else f"{points(low)} to {points(high)}"


def p_text(p: float | None) -> str:
    """A p-value: "0.034", "<0.001", "n/a"."""
    if p is None:
        return "n/a"
    text = f"{p:.3f}" if p < 0.1 else f"{p:.2f}"
    return "<0.001" if p < 0.001 else "<0.05" if p < ALPHA and text == "0.050" else text


def sentence(text: str) -> str:
    """With a capital at the start, unless it starts with a variant's name."""
    return text if "_" in text.split()[0] else text[0].upper() + text[1:]


def label(variant: str, cells: Sequence[Comparison | None]) -> str:
    """The variant, and what stands in where its own counterpart did not run."""
    stand_in = {c.against for c in cells if c is not None and c.against.endswith(", intended")}
    return f"{variant} (minus {stand_in.pop()})" if stand_in else variant


def detectable_text(c: Comparison) -> str:
    """How large a difference the comparison could have seen: "5.7", or why that cannot be told."""
    if c.detectable is not None:
        return f"{100 * c.detectable:.1f}"
    return "cannot be told from one seed" if len(c.seeds) == 1 else "cannot be told: the seeds do not differ"


def margin_text(c: Comparison) -> str:
    """The margin of equivalence: "+-2 points"."""
    return f"+-{100 * c.margin:g} points"


def verdict_text(c: Comparison) -> str:
    """A comparison in words: "+3.8 points (95 % t interval ..., 3 seeds; bootstrap ...): above, p ... "."""
    seeds = f"{len(c.seeds)} seed{'s' if len(c.seeds) > 1 else ''}"
    if len(c.seeds) == 1:
        seeds, interval = "one seed", "no interval over seeds"
    else:
        interval = f"95 % t interval {span(c.low, c.high)}" if c.low is not None else f"no t interval, {c.note}"
    boot = "" if c.boot_low is None else f"; bootstrap {span(c.boot_low, c.boot_high)}"
    seen = f"; smallest detectable difference {detectable_text(c)}"
    test = "" if c.p_holm is None else f", p {p_text(c.p_holm)}"
    corrected = f" after correction over {c.family}" if c.family > 1 and c.p_holm is not None else ""
    said = c.verdict
    if said == "equivalent":
        said += f" within {margin_text(c)} (p {p_text(c.p_equal)})"
    elif c.decided and c.within_margin:
        said += f", by less than {100 * c.margin:g} points"
    return f"{points(c.value)} points ({interval}, {seeds}{boot}{seen}): {said}{test}{corrected}"


def _many(n: int) -> str:
    return f"{n} variant{'s' if n != 1 else ''}"


def _counts(verdicts: Sequence[str]) -> str:
    """How often each verdict was given; "not judged" only where it was."""
    if set(verdicts) == {"not judged"}:
        return "none is judged"
    return ", ".join(f"{verdicts.count(v)} {v}" for v in VERDICTS if v != "not judged" or v in verdicts)


def headline(found: dict) -> str:
    """The answer in one sentence, by the verdicts on the mean over variants (the baseline's where there is no mean),
    with the smallest differences that could have been seen. Outcomes that are not judged do not count, unless none is.
    """
    every = found["mean"] or found["baseline"]
    if not every:
        return "This study cannot answer the question: it needs few-shot rows of both regimes."
    asked = [c for c in every if not c.barred] or every
    first = asked[0]
    of = f"over {first.note}" if found["mean"] and first.note.endswith("variants") else "over all variants"
    what = f"on average {of}" if found["mean"] else f"for {first.variant}"
    several = len({c.suite for c in asked}) > 1
    names = {c.outcome: " ".join(c.outcome) if several else c.probe for c in asked}
    parts = "; ".join(
        f"{names[c.outcome]} {points(c.value)} ({c.note if c.low is None else span(c.low, c.high)}), {c.verdict}"
        for c in asked
    )
    some, others = "for some numbers of shots", "for others this study cannot tell,"
    same = f"few-shot accuracy that is the same to within {margin_text(first)}"
    start = {
        ("above",): "Yes, in this study: mixed pretraining gives higher few-shot accuracy",
        ("below",): "No: in this study mixed pretraining gives lower few-shot accuracy",
        ("equivalent",): f"No difference that matters: mixed and single pretraining give {same}",
        ("undecided",): "Undecided: this study cannot tell mixed from single pretraining",
        ("above", "undecided"): f"Partly: {some} mixed pretraining gives higher few-shot accuracy, {others}",
        ("below", "undecided"): f"Partly: {some} mixed pretraining gives lower few-shot accuracy, {others}",
        ("equivalent", "undecided"): f"Partly: {some} mixed and single pretraining give {same}, {others}",
        ("not judged",): "Not answered: no few-shot suite of this study has passed the instrument check, so that no "
        "difference on it is a finding; mixed minus single pretraining",
    }.get(
        tuple(sorted({c.verdict for c in asked})), "It depends on the number of shots: mixed minus single pretraining"
    )
    if all(c.detectable is None for c in asked):
        seen = f"how large a difference it could have seen {detectable_text(first)}"
    else:
        sizes = ", ".join(f"{names[c.outcome]} {detectable_text(c)}" for c in asked)
        seen = f"the smallest difference it could have seen, with a power of 80 %: {sizes}"
    left = len(every) - len(asked)
    more = f"; {left} outcome{'s' if left > 1 else ''} not judged" if left else ""
    return f"{start} {what}, in percentage points: {parts}; {seen}{more}."


def answer_lines(found: dict) -> list[str]:
    """What stands under the main table: each test in words, and how single variants came out."""
    lines = [
        f"{' '.join(c.outcome)}, {c.variant}: mixed minus single {verdict_text(c)}."
        for c in found["mean"] + found["baseline"]
    ]
    for outcome, n in found["variants"].items():
        names = [f"{w}: {', '.join(n[w])}" for w in ("above", "below", "equivalent") if n[w]]
        counts = _counts([v for v in VERDICTS for _ in n[v]])
        lines.append(
            f"{' '.join(outcome)}, {_many(n['of'])} one by one after correction: {counts}"
            + (f" ({'; '.join(names)})." if names else ".")
        )
    return lines


def barred_lines(barred: Mapping[str, str]) -> list[str]:
    """Why suites are not judged, suites of one reason together."""
    by_reason: dict[str, list[str]] = {}
    for suite, reason in barred.items():
        by_reason.setdefault(reason, []).append(suite)
    return [f"Not judged: {', '.join(suites)}: {reason}." for reason, suites in by_reason.items()]


def random_lines(comparisons: Sequence[Comparison], compat: str) -> list[str]:
    """Whether pretraining gave anything at all for few-shot recognition: runs above and below random init."""
    found: dict[tuple, list[str]] = {}
    for c in comparisons:
        if c.kind == "random" and c.compat == compat and is_fewshot(c.outcome):
            found.setdefault((" ".join(c.outcome), c.regime), []).append(c.verdict)
    return [
        f"{outcome} against random init, {regime}: of {_many(len(verdicts))}, after correction: {_counts(verdicts)}."
        for (outcome, regime), verdicts in found.items()
    ]


def chance_lines(study: Study) -> list[str]:
    """How far few-shot recognition is from guessing: a difference between two encoders that guess says nothing."""
    out, chances = [], tables.chances(study)
    lines = {r: tables.accuracy_lines(study, r, study.compat) for r in study.regimes}
    for at, outcome in enumerate(study.outcomes):
        found = {(v, r): mean[0] for r in lines for v, _, cells in lines[r] if (mean := cells[at]) is not None}
        runs, random, low, high = _ends(found, 100)
        if is_fewshot(outcome) and runs:
            near = sum(abs(v - chances[outcome]) < NEAR for v in runs.values())
            random = random and f", {random}"
            out.append(
                f"{' '.join(outcome)}: chance is {100 * chances[outcome]:.1f} %{random}, the variants' means go from "
                f"{low} to {high}; {near} of {len(runs)} lie less than {100 * NEAR:g} point from chance"
                + (", where a difference tells little of recognition." if near else ".")
            )
    return out


def _ends(found: Mapping[tuple[str, str], float], unit: float = 1) -> tuple[dict, str, str, str]:
    """Of values by (variant, regime): those of variants, and as text random init's, the least and the greatest."""
    runs = {k: v for k, v in found.items() if k[0] != RANDOM}
    if not runs:
        return {}, "", "", ""
    random = next((f"random init {unit * v:.1f}" for k, v in found.items() if k[0] == RANDOM), "")
    ends = min(runs, key=runs.__getitem__), max(runs, key=runs.__getitem__)
    low, high = (f"{unit * runs[k]:.1f} ({', '.join(k)})" for k in ends)
    return runs, random, low, high


def rank_lines(table: Sequence[dict]) -> list[str]:
    """Whether features collapse: the ends of RankMe over the variants, beside random init."""
    rows = [r for r in table if (r["level"], r["subspace"]) == ("all", "all") and r["rankme"] is not None]
    runs, random, low, high = _ends({(r["variant"], r["regime"]): r["rankme"] for r in rows})
    random = random and f"; {random}"
    text = f"Directions that the features use (RankMe, 1 is full collapse): {low} to {high}{random}."
    return [text] if runs else []


def tradeoff_lines(comparisons: Sequence[Comparison], study: Study) -> list[str]:
    """The second half of the question: which variants moved which outcome beyond the corrected test, per regime."""
    out = []
    for regime in study.regimes:
        found = [c for c in comparisons if (c.kind, c.regime, c.compat) == ("baseline", regime, study.compat)]
        judged = [c for c in found if not c.barred]
        decided = [f"{c.variant} {' '.join(c.outcome)} {points(c.value)}" for c in judged if c.decided]
        said = f"{len(decided)} of {len(judged)} differences to the baseline are above or below after correction"
        said += f": {'; '.join(decided) or 'none'}."
        if len(judged) < len(found):
            left = f"{len(found) - len(judged)} differences to the baseline are not judged"
            said = f"{said} {left}." if judged else f"{left}."
        out.append(f"{regime}: {said if found else 'no variant beside the baseline has a result.'}")
    return out
