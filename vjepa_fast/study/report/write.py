"""The report of a study: one HTML file with everything inside it, and the same numbers as Markdown, CSV and LaTeX."""

from __future__ import annotations

import datetime
import functools
import os
import re
from pathlib import Path

from vjepa_fast.errors import UserError
from vjepa_fast.study import stats
from vjepa_fast.study.records import BASELINE, RANDOM, Study, is_fewshot, load_study, some, table_rows, write_csv
from vjepa_fast.study.report import figures as study_plots
from vjepa_fast.study.report import tables as study_tables
from vjepa_fast.study.report.tables import name_of, p_text, points, span
from vjepa_fast.study.run.variants import COUNTED
from vjepa_fast.study.stats import MEAN, STUDENT, Comparison

QUESTION = (
    "Does pretraining on mixed data improve few-shot recognition over single-dataset pretraining, and what does each "
    "objective trade away?"
)
VERSIONS = ("package", "vjepa_fast", "torch", "python", "commit", "device", "dtype", "system")  # must not differ
NEAR = 0.01  # of chance
FILES = {"html": "report.html", "md": "report.md", "csv": "report.csv", "latex": "report.tex"}


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


def random_lines(comparisons: list[Comparison], compat: str) -> list[str]:
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
            (variant, regime): line[at][0]
            for regime in study.regimes
            for variant, _, line in study_tables.accuracy_lines(study, regime, study.compat)
            if line[at] is not None
        }
        runs = {k: v for k, v in found.items() if k[0] != RANDOM}
        if not runs:
            continue
        chance = study_tables.chances(study)[outcome]
        ends = [f"{100 * runs[k]:.1f} ({', '.join(k)})" for k in (min(runs, key=runs.get), max(runs, key=runs.get))]
        near = sum(abs(v - chance) < NEAR for v in runs.values())
        random = next((f", random init {100 * v:.1f}" for k, v in found.items() if k[0] == RANDOM), "")
        out.append(
            f"{name_of(outcome)}: chance is {100 * chance:.1f} %{random}, the variants' means go from {ends[0]} to "
            f"{ends[1]}; {near} of {len(runs)} lie less than {100 * NEAR:g} point from chance"
            + (", where a difference tells little of recognition." if near else ".")
        )
    return out


def rank_lines(table: list[dict]) -> list[str]:
    """Whether features collapse: the ends of RankMe over the variants, beside random init."""
    found = {
        (r["variant"], r["regime"]): r["rankme"]
        for r in table
        if (r["level"], r["subspace"]) == ("all", "all") and r["rankme"] is not None
    }
    runs = {k: v for k, v in found.items() if k[0] != RANDOM}
    if not runs:
        return []
    low, high = (f"{runs[k]:.1f} ({', '.join(k)})" for k in (min(runs, key=runs.get), max(runs, key=runs.get)))
    random = next((f"; random init {v:.1f}" for k, v in found.items() if k[0] == RANDOM), "")
    return [f"Directions that the features use (RankMe, 1 is full collapse): {low} to {high}{random}."]


def tradeoff_lines(comparisons: list[Comparison], study: Study) -> list[str]:
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


def environment_of(study: Study) -> dict[str, str]:
    """Versions, commit, device and sizes of the plan as text; versions that differ between cells are named."""
    plan = study.plan
    out = {k: str(plan[k]) for k in ("suite", "device", "commit") if plan.get(k)}
    for key in ("sizes", "evaluation", "versions"):
        if plan.get(key):
            out[key] = _plain(plan[key])
    for key in sorted({k for c in study.cells.values() for k in c.versions if k in VERSIONS}):
        seen = sorted({str(c.versions[key]) for c in study.cells.values() if key in c.versions})
        if key in ("commit", "device"):  # of the runs: the plan has those of the last command
            out[key] = ", ".join(seen) + (" (+: with changes not committed)" if "+" in "".join(seen) else "")
        if len(seen) > 1:
            out[f"runs differ in {key}"] = ", ".join(seen)
    minutes = [c.cost["minutes"] for c in study.cells.values() if c.cost.get("minutes") is not None]
    if minutes:
        out["training time"] = f"{sum(minutes):.0f} minutes in all"
    return out


def _plain(value) -> str:
    """Nested values as one line: "motion8 (train 800, test 480), order (...)"."""
    if not isinstance(value, dict):
        return ", ".join(map(str, value)) if isinstance(value, list) else str(value)
    return ", ".join(f"{k} ({_plain(v)})" if isinstance(v, dict) else f"{k} {_plain(v)}" for k, v in value.items())


def content(study: Study) -> dict:
    """Everything the report says, computed once; all four forms are made of it."""
    comparisons, geometry = stats.all_comparisons(study), study_plots.geometry_table(study)
    found = stats.answer(comparisons, study.compat)
    tables = {kind: study_tables.delta_tables(comparisons, study, kind) for kind in stats.KINDS}
    families = {(c.kind, c.regime, c.compat, c.outcome, c.variant in COUNTED) for c in comparisons if c.variant != MEAN}
    return {
        "title": f"The study: {sum(v != BASELINE for v in study.variants)} objectives beside the baseline, "
        f"{' and '.join(study.regimes)}, {len(study.seeds)} seed" + ("s" if len(study.seeds) != 1 else ""),
        "question": QUESTION,
        "study": study,
        "comparisons": comparisons,
        "headline": headline(found),
        "answer_lines": answer_lines(found)
        + chance_lines(study)
        + random_lines(comparisons, study.compat)
        + rank_lines(geometry),
        "tradeoff_lines": tradeoff_lines(comparisons, study),
        "tables": [t for kind in stats.KINDS for t in tables[kind]],
        "by_kind": tables,
        "missing": list(study.missing),
        "missing_text": some(study.missing),
        "cost": study_plots.cost_table(study),
        "geometry": geometry,
        "environment": environment_of(study),
        "families": len(families),
        "chances": study_tables.chances(study),
    }


def pictures(content: dict) -> dict[str, str | None]:
    """The report's plots by name (question_svg, forest_svg, ...) as SVG text; None where there is nothing to show."""
    study, comparisons = content["study"], content["comparisons"]

    def panels(kind: str, compat: str, few: bool | None = None) -> dict:
        found = [c for c in comparisons if (c.kind, c.compat) == (kind, compat)]
        shown = [o for o in study.outcomes if few is None or is_fewshot(o) is few]
        return {name_of(o): [c for c in found if c.outcome == o] for o in shown}

    order = [*(name for v in study.variants for name in (v, v + STUDENT)), MEAN]
    return {
        "question_svg": study_plots.forest(panels("regime", study.compat, True), order),
        "forest_svg": study_plots.forest(panels("baseline", study.compat), order),
        "modes_svg": study_plots.forest(panels("mode", "published"), order),
        "tradeoff_svg": study_plots.tradeoff(comparisons, study),
        "cost_svg": study_plots.cost(study),
        "curves_svg": study_plots.curves(study),
        "geometry_svg": study_plots.geometry(study),
    }


def render_html(content: dict) -> str:
    """The HTML report, with pictures inside."""
    import jinja2

    study = content["study"]
    loader = jinja2.FileSystemLoader([Path(__file__).parent / "templates", Path(__file__).parents[1] / "templates"])
    environment = jinja2.Environment(loader=loader, autoescape=True, trim_blocks=True, lstrip_blocks=True)
    minus = functools.partial(re.sub, r"(?<![\w.])-(?=\d)", "\N{MINUS SIGN}")
    environment.filters.update(
        points=lambda x: minus(points(x)), p_text=p_text, minus=minus, sentence=study_tables.sentence
    )
    environment.globals.update(span=lambda low, high: minus(span(low, high)))

    shared, differ, lines = study_tables.settings_table(study)
    columns, ran = study_tables.coverage(study)
    temporal, appearance = study_plots.tradeoff_axes(study.outcomes)
    shared_machine = max((c.cost.get("side_by_side") or 1 for c in study.cells.values()), default=1)
    return environment.get_template("study.html.j2").render(
        **content,
        created=datetime.datetime.now().astimezone().strftime("%d %B %Y, %H:%M %Z"),
        **pictures(content),
        accuracy={r: study_tables.accuracy_lines(study, r, study.compat) for r in study.regimes},
        geometry_lines=study_tables.geometry_lines(content["geometry"]),
        geometry_columns=study_tables.GEOMETRY_COLUMNS,
        temporal=temporal,
        appearance=appearance,
        shared=shared,
        differ=differ,
        setting_lines=lines,
        coverage_columns=columns,
        coverage=ran,
        shared_machine=shared_machine,
        label=study_tables.label,
    )


def write_study_report(
    folder: str | os.PathLike, paths: dict[str, str | os.PathLike] | None = None, *, partial: bool = False
) -> tuple[dict, list[Path]]:
    """Read the study in ``folder`` and write its report: (content, paths written).

    ``paths`` maps html, md, csv, latex to files; by default all four go into ``folder`` as report.*. ``results.csv``,
    one line per run and outcome, is always written beside the study. Raises DataError for a study that cannot be read
    (see ``results.load_study``) and UserError where a file cannot be written.
    """
    study = load_study(folder, partial)
    paths = {k: Path(p) for k, p in (paths or {k: Path(folder) / name for k, name in FILES.items()}).items()}
    made = content(study)
    written = []
    try:
        written.append(write_csv(study.folder / "results.csv", table_rows(study)))
        for kind, path in paths.items():
            if kind == "csv":
                written.append(write_csv(path, study_tables.comparison_rows(made["comparisons"])))
                continue
            text = {"html": render_html, "md": study_tables.markdown, "latex": study_tables.latex}[kind](made)
            written.append(_write(path, text))
    except OSError as error:
        raise UserError(f"{error.filename or folder}: the report cannot be written ({error.strerror})") from None
    return made, written


def _write(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)
    return path
