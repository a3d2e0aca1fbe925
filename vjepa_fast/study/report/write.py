"""Writing a study's report: one self-contained HTML file, and the same numbers as Markdown, CSV, LaTeX and JSON."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vjepa_fast.files import write_text
from vjepa_fast.study import pages, stats
from vjepa_fast.study.power import MARGIN
from vjepa_fast.study.records import BASELINE, Study, is_fewshot, load_study, some, table_rows, write_csv
from vjepa_fast.study.report import figures, instrument, sentences, tables
from vjepa_fast.study.report.sentences import label, points, sentence, span
from vjepa_fast.study.run.variants import COUNTED
from vjepa_fast.study.stats import MEAN, Comparison

QUESTION = (
    "Does pretraining on mixed data improve few-shot recognition over single-dataset pretraining, and what does each "
    "objective trade away?"
)
FILES = {"html": "report.html", "md": "report.md", "csv": "report.csv", "latex": "report.tex", "json": "report.json"}


def content(study: Study, margin: float = MARGIN) -> dict[str, Any]:
    """Everything the report says, computed once; all five forms are made of it. ``margin``: of equivalence."""
    checked = instrument.read(study)
    barred = instrument.barred(study, checked)
    comparisons = stats.all_comparisons(study, margin, barred)
    geometry = tables.geometry_table(study)
    found = stats.answer(comparisons, study.compat)
    by_kind = {kind: tables.delta_tables(comparisons, study, kind) for kind in stats.KINDS}
    families = {(c.kind, c.regime, c.compat, c.outcome, c.variant in COUNTED) for c in comparisons if c.variant != MEAN}
    temporal, appearance = tables.tradeoff_axes(study.outcomes)
    return {
        "title": f"The study: {sum(v != BASELINE for v in study.variants)} objectives beside the baseline, "
        f"{' and '.join(study.regimes)}, {len(study.seeds)} seed" + ("s" if len(study.seeds) != 1 else ""),
        "question": QUESTION,
        "study": study,
        "margin": margin,
        "comparisons": comparisons,
        "headline": sentences.headline(found),
        "instrument": checked,
        "instrument_lines": instrument.lines(study, checked),
        "controls": instrument.NAMES,
        "barred": barred,
        "check_text": instrument.summary(checked, barred),
        "barred_lines": sentences.barred_lines(barred),
        "answer_lines": sentences.answer_lines(found)
        + sentences.chance_lines(study)
        + sentences.random_lines(comparisons, study.compat)
        + sentences.rank_lines(geometry),
        "tradeoff_lines": sentences.tradeoff_lines(comparisons, study),
        "tables": [t for kind in stats.KINDS for t in by_kind[kind]],
        "by_kind": by_kind,
        "missing": list(study.missing),
        "missing_text": some(study.missing),
        "accuracy": {r: tables.accuracy_lines(study, r, study.compat) for r in study.regimes},
        "chances": tables.chances(study),
        "compute": tables.compute_table(study),
        "compute_unit": tables.compute_unit(study),
        "compute_outcomes": tables.compute_outcomes(study),
        "cost": tables.cost_table(study),
        "shared_machine": max((c.cost.get("side_by_side") or 1 for c in study.cells.values()), default=1),
        "geometry": geometry,
        "geometry_lines": tables.geometry_lines(geometry),
        "geometry_columns": tables.GEOMETRY_COLUMNS,
        "environment": tables.environment_of(study),
        "families": len(families),
        "temporal": temporal,
        "appearance": appearance,
        "runs": tables.run_lines(study),
        "few": [o for o in study.outcomes if is_fewshot(o)],
        **tables.settings_table(study),
        **tables.coverage(study),
    }


def pictures(content: Mapping[str, Any]) -> dict[str, str | None]:
    """The report's plots by name (question_svg, forest_svg, ...) as SVG text; None where there is nothing to show."""
    study, comparisons = content["study"], content["comparisons"]

    def panels(kind: str, compat: str, few: bool | None = None) -> dict:
        found = [c for c in comparisons if (c.kind, c.compat) == (kind, compat)]
        shown = [o for o in study.outcomes if few is None or is_fewshot(o) is few]
        return {" ".join(o): [c for c in found if c.outcome == o] for o in shown}

    order = tables.line_order(study)
    return {
        "question_svg": figures.answer(panels("regime", study.compat, True), order),
        "forest_svg": figures.forest(panels("baseline", study.compat), order),
        "modes_svg": figures.forest(panels("mode", "published"), order),
        "tradeoff_svg": figures.tradeoff(comparisons, study),
        "compute_svg": figures.compute(study),
        "cost_svg": figures.cost(study),
        "curves_svg": figures.curves(study),
        "geometry_svg": figures.geometry(study),
    }


def _render(name: str, content: Mapping[str, Any]) -> str:
    return pages.render(
        Path(__file__).parent / "templates" / name,
        {**content, "label": label, "span": span, "detectable": sentences.detectable_text, "mean_line": MEAN},
        points=points,
        p_text=sentences.p_text,
        sentence=sentence,
        minus=lambda text: re.sub(r"(?<![\w.])-(?=\d)", "\N{MINUS SIGN}", text),
    )


def html(content: Mapping[str, Any]) -> str:
    """The report as HTML, with the pictures inside."""
    return _render("study.html.j2", {**content, **pictures(content)})


def markdown(content: Mapping[str, Any]) -> str:
    """The report as Markdown."""
    return _render("study.md.j2", content)


def as_json(content: Mapping[str, Any]) -> str:
    """The numbers of the report as JSON: the answer, the instrument check, every comparison, accuracy at what cost."""
    found = {
        "format": 1,
        **{k: content[k] for k in ("title", "question", "headline", "barred", "instrument", "missing", "environment")},
        "lines": content["answer_lines"] + content["tradeoff_lines"],
        "comparisons": tables.comparison_rows(content["comparisons"]),
        "compute": [
            {**row, "unit": content["compute_unit"], "outcomes": {" ".join(o): v for o, v in row["outcomes"].items()}}
            for row in content["compute"]
        ],
        "runs": content["runs"],
    }
    return json.dumps(found, indent=1) + "\n"


def latex(content: Mapping[str, Any]) -> str:
    """All tables of differences as LaTeX (packages booktabs and graphicx), one ``table*`` each."""
    out = [
        f"% {_one_line(content['title'])}; commit {_one_line(content['environment'].get('commit', 'unknown'))}",
        r"% needs \usepackage{booktabs,graphicx}",
    ]
    out += [f"% {_one_line(line)}" for line in (content["headline"], *content["barred_lines"])]
    for table in content["tables"]:
        caption = (
            f"{sentence(table.title)}: percentage points; below them the 95 % paired t interval over seeds and the "
            "minimum detectable difference (MDD, power 80 %). Bold: significant at 5 % after Holm's correction within "
            f"an outcome over {', '.join(map(str, table.families))} comparisons; = is equivalent within "
            f"{100 * content['margin']:g} points."
        )
        left = [s for s in dict.fromkeys(s for s, _ in table.columns) if s in content["barred"]]
        caption += f" Not judged: {', '.join(left)}." if left else ""
        suites = list(dict.fromkeys(s for s, _ in table.columns))
        columns = sorted(table.columns, key=lambda o: suites.index(o[0]))
        spans = [rf"\multicolumn{{{sum(s == o[0] for o in columns)}}}{{c}}{{{_escape(s)}}}" for s in suites]
        place = "-".join(re.sub(r"[^A-Za-z0-9]+", "-", part) for part in (table.kind, table.regime, table.compat))
        out += [
            "",
            r"\begin{table*}",
            r"\centering",
            rf"\caption{{{_escape(caption)}}}",
            rf"\label{{tab:{place}}}",
            r"\resizebox{\linewidth}{!}{%",
            rf"\begin{{tabular}}{{l{'r' * len(columns)}}}",
            r"\toprule",
            rf" & {' & '.join(spans)} \\",
            rf"variant & {' & '.join(_escape(p) for _, p in columns)} \\",
            r"\midrule",
        ]
        for variant, cells in table.lines:
            by_column = dict(zip(table.columns, cells))
            out += [r"\midrule"] if variant == MEAN else []
            out.append(rf"{_escape(label(variant, cells))} & {' & '.join(_cell(by_column[o]) for o in columns)} \\")
        out += [r"\bottomrule", r"\end{tabular}}", r"\end{table*}"]
    return "\n".join(out) + "\n"


def _one_line(text: object) -> str:
    """Text that stays on its line, so that what is a comment stays one."""
    return " ".join(str(text).split())


def _escape(text: str) -> str:
    """Text on one line with LaTeX's special characters escaped."""
    special = {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"}
    return "".join(special.get(c, f"\\{c}" if c in "&%$#_{}" else c) for c in _one_line(text))


def _cell(c: Comparison | None) -> str:
    if c is None:
        return "--"
    value = points(c.value).replace("-", "$-$")
    value = rf"\textbf{{{value}}}" if c.decided else f"{value} (=)" if c.verdict == "equivalent" else value
    interval = "n/a" if c.low is None else f"[{points(c.low)}, {points(c.high)}]".replace("-", "$-$")
    seen = "" if c.detectable is None else rf"\\{{\tiny MDD {100 * c.detectable:.1f}}}"
    return rf"\shortstack{{{value}\\{{\tiny {interval}}}{seen}}}"


def write_study_report(
    folder: str | os.PathLike,
    paths: Mapping[str, str | os.PathLike] | None = None,
    *,
    partial: bool = False,
    margin: float = MARGIN,
) -> tuple[dict[str, Any], list[Path]]:
    """Read the study in ``folder`` and write its report: (content, paths written).

    ``paths`` has the files of html, md, csv, latex and json that are wanted (default: all in ``folder`` as report.*).
    ``results.csv``, one line per run and outcome, is always written beside the study. ``partial``: report although
    cells are missing. ``margin``: differences within it are equivalent, a fraction. Raises DataError where the study or
    its instrument check cannot be read, UserError where a file cannot be written.
    """
    study = load_study(folder, partial)
    made = content(study, margin)
    written = [write_csv(study.folder / "results.csv", table_rows(study))]
    for kind, path in (paths or {k: Path(folder) / name for k, name in FILES.items()}).items():
        if kind == "csv":
            write_csv(path, tables.comparison_rows(made["comparisons"]))
        else:
            write_text(Path(path), {"html": html, "md": markdown, "latex": latex, "json": as_json}[kind](made))
        written.append(Path(path))
    return made, written
