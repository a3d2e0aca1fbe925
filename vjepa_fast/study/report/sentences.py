"""The findings of a study in words, and its numbers as text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from vjepa_fast.study.records import RANDOM, Study, is_fewshot
from vjepa_fast.study.report import tables
from vjepa_fast.study.stats import ALPHA, Comparison

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


def name_of(outcome: tuple[str, str]) -> str:
    """("fewshot", "1-shot") as "few-shot 1-shot"; others as "suite probe"."""
    return " ".join(outcome)


def sentence(text: str) -> str:
    """With a capital at the start, unless it starts with a variant's name."""
    return text if "_" in text.split()[0] else text[0].upper() + text[1:]


def label(variant: str, cells: Sequence[Comparison | None]) -> str:
    """The variant, and what stands in where its own counterpart did not run."""
    stand_in = {c.against for c in cells if c is not None and c.against.endswith(", intended")}
    return f"{variant} (minus {stand_in.pop()})" if stand_in else variant


def verdict_text(c: Comparison) -> str:
    """A comparison in words: "+3.8 points (95 % t interval ..., 3 seeds; bootstrap ...): above, p ... "."""
    seeds = f"{len(c.seeds)} seed{'s' if len(c.seeds) > 1 else ''}"
    if len(c.seeds) == 1:
        seeds, interval = "one seed", "no interval over seeds"
    else:
        interval = f"95 % t interval {span(c.low, c.high)}" if c.low is not None else f"no t interval, {c.note}"
    boot = "" if c.boot_low is None else f"; bootstrap {span(c.boot_low, c.boot_high)}"
    test = "" if c.p_holm is None else f", p {p_text(c.p_holm)}"
    corrected = f" after correction over {c.family}" if c.family > 1 and c.p_holm is not None else ""
    return f"{points(c.value)} points ({interval}, {seeds}{boot}): {c.verdict}{test}{corrected}"


def _many(n: int) -> str:
    return f"{n} variant{'s' if n != 1 else ''}"


def headline(found: dict) -> str:
    """The answer in one sentence, by the verdicts on the mean over variants (the baseline's where there is no mean)."""
    asked = found["mean"] or found["baseline"]
    if not asked:
        return "This study cannot answer the question: it needs few-shot rows of both regimes."
    of = f"over {asked[0].note}" if found["mean"] and asked[0].note.endswith("variants") else "over all variants"
    what = f"on average {of}" if found["mean"] else f"for {asked[0].variant}"
    parts = "; ".join(
        f"{c.probe} {points(c.value)} ({c.note if c.low is None else span(c.low, c.high)}), {c.verdict}" for c in asked
    )
    words = {c.verdict for c in asked}
    start = {
        frozenset({"above"}): "Yes, in this study: mixed pretraining gives higher few-shot accuracy",
        frozenset({"below"}): "No: in this study mixed pretraining gives lower few-shot accuracy",
        frozenset({"undecided"}): "Undecided: this study cannot tell mixed from single pretraining",
        frozenset({"above", "undecided"}): "Partly: for some numbers of shots mixed pretraining gives higher few-shot "
        "accuracy, for others this study cannot tell,",
        frozenset({"below", "undecided"}): "Partly: for some numbers of shots mixed pretraining gives lower few-shot "
        "accuracy, for others this study cannot tell,",
    }.get(frozenset(words), "It depends on the number of shots: mixed minus single pretraining")
    return f"{start} {what}, in percentage points: {parts}."


def answer_lines(found: dict) -> list[str]:
    """What stands under the headline: each test in words, and how single variants came out."""
    lines = [
        f"{name_of(c.outcome)}, {c.variant}: mixed minus single {verdict_text(c)}."
        for c in found["mean"] + found["baseline"]
    ]
    for outcome, n in found["variants"].items():
        names = [f"{w}: {', '.join(n[w])}" for w in ("above", "below") if n[w]]
        lines.append(
            f"{name_of(outcome)}, {_many(n['of'])} one by one after correction: {len(n['above'])} above, "
            f"{len(n['below'])} below, {len(n['undecided'])} undecided" + (f" ({'; '.join(names)})." if names else ".")
        )
    return lines


def random_lines(comparisons: Sequence[Comparison], compat: str) -> list[str]:
    """Whether pretraining gave anything at all for few-shot recognition: runs above and below random init."""
    found = [c for c in comparisons if c.kind == "random" and c.compat == compat and is_fewshot(c.outcome)]
    return [
        f"{name_of(outcome)} against random init, {regime}: of {_many(len(here))} "
        + ", ".join(f"{sum(c.verdict == w for c in here)} {w}" for w in ("above", "below", "undecided"))
        + " after correction."
        for outcome, regime in dict.fromkeys((c.outcome, c.regime) for c in found)
        for here in [[c for c in found if (c.outcome, c.regime) == (outcome, regime)]]
    ]


def chance_lines(study: Study) -> list[str]:
    """How far few-shot recognition is from guessing: a difference between two encoders that guess says nothing."""
    out = []
    for outcome in filter(is_fewshot, study.outcomes):
        at = study.outcomes.index(outcome)
        found = {
            (variant, regime): cell[0]
            for regime in study.regimes
            for variant, _, line in tables.accuracy_lines(study, regime, study.compat)
            if (cell := line[at]) is not None
        }
        runs = {k: v for k, v in found.items() if k[0] != RANDOM}
        if not runs:
            continue
        chance = tables.chances(study)[outcome]
        ends = [f"{100 * runs[k]:.1f} ({', '.join(k)})" for k in _ends(runs)]
        near = sum(abs(v - chance) < NEAR for v in runs.values())
        random = next((f", random init {100 * v:.1f}" for k, v in found.items() if k[0] == RANDOM), "")
        out.append(
            f"{name_of(outcome)}: chance is {100 * chance:.1f} %{random}, the variants' means go from {ends[0]} to "
            f"{ends[1]}; {near} of {len(runs)} lie less than {100 * NEAR:g} point from chance"
            + (", where a difference tells little of recognition." if near else ".")
        )
    return out


def _ends(values: Mapping[tuple[str, str], float]) -> tuple[tuple[str, str], tuple[str, str]]:
    """The keys of the least and of the greatest value."""
    return min(values, key=values.__getitem__), max(values, key=values.__getitem__)


def rank_lines(table: Sequence[dict]) -> list[str]:
    """Whether features collapse: the ends of RankMe over the variants, beside random init."""
    found = {
        (r["variant"], r["regime"]): r["rankme"]
        for r in table
        if (r["level"], r["subspace"]) == ("all", "all") and r["rankme"] is not None
    }
    runs = {k: v for k, v in found.items() if k[0] != RANDOM}
    if not runs:
        return []
    low, high = (f"{runs[k]:.1f} ({', '.join(k)})" for k in _ends(runs))
    random = next((f"; random init {v:.1f}" for k, v in found.items() if k[0] == RANDOM), "")
    return [f"Directions that the features use (RankMe, 1 is full collapse): {low} to {high}{random}."]


def tradeoff_lines(comparisons: Sequence[Comparison], study: Study) -> list[str]:
    """The second half of the question: which variants moved which outcome beyond the corrected test, per regime."""
    out = []
    for regime in study.regimes:
        found = [c for c in comparisons if (c.kind, c.regime, c.compat) == ("baseline", regime, study.compat)]
        decided = [c for c in found if c.verdict != "undecided"]
        said = "; ".join(f"{c.variant} {name_of(c.outcome)} {points(c.value)}" for c in decided) or "none"
        if not found:
            out.append(f"{regime}: no variant beside the baseline has a result.")
            continue
        count = f"{len(decided)} of {len(found)} differences to the baseline"
        out.append(f"{regime}: {count} are decided after correction: {said}.")
    return out
