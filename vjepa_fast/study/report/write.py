"""Writing a study's report: one self-contained HTML file, and the same numbers as Markdown, CSV and LaTeX."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vjepa_fast.files import write_text
from vjepa_fast.study import pages, stats
from vjepa_fast.study.records import BASELINE, Study, is_fewshot, load_study, some, table_rows, write_csv
from vjepa_fast.study.report import figures, sentences, tables
from vjepa_fast.study.report.sentences import label, points, sentence, span
from vjepa_fast.study.run.variants import COUNTED
from vjepa_fast.study.stats import MEAN, Comparison

QUESTION = (
    "Does pretraining on mixed data improve few-shot recognition over single-dataset pretraining, and what does each "
    "objective trade away?"
)
FILES = {"html": "report.html", "md": "report.md", "csv": "report.csv", "latex": "report.tex"}


def content(study: Study) -> dict[str, Any]:
    """Everything the report says, computed once; all four forms are made of it."""
    comparisons, geometry = stats.all_comparisons(study), tables.geometry_table(study)
    found = stats.answer(comparisons, study.compat)
    by_kind = {kind: tables.delta_tables(comparisons, study, kind) for kind in stats.KINDS}
    families = {(c.kind, c.regime, c.compat, c.outcome, c.variant in COUNTED) for c in comparisons if c.variant != MEAN}
    temporal, appearance = tables.tradeoff_axes(study.outcomes)
    return {
        "title": f"The study: {sum(v != BASELINE for v in study.variants)} objectives beside the baseline, "
        f"{' and '.join(study.regimes)}, {len(study.seeds)} seed" + ("s" if len(study.seeds) != 1 else ""),
        "question": QUESTION,
        "study": study,
        "comparisons": comparisons,
        "headline": sentences.headline(found),
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
        "cost": tables.cost_table(study),
        "shared_machine": max((c.cost.get("side_by_side") or 1 for c in study.cells.values()), default=1),
        "geometry": geometry,
        "geometry_lines": tables.geometry_lines(geometry),
        "geometry_columns": tables.GEOMETRY_COLUMNS,
        "environment": tables.environment_of(study),
        "families": len(families),
        "temporal": temporal,
        "appearance": appearance,
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
        "question_svg": figures.forest(panels("regime", study.compat, True), order),
        "forest_svg": figures.forest(panels("baseline", study.compat), order),
        "modes_svg": figures.forest(panels("mode", "published"), order),
        "tradeoff_svg": figures.tradeoff(comparisons, study),
        "cost_svg": figures.cost(study),
        "curves_svg": figures.curves(study),
        "geometry_svg": figures.geometry(study),
    }


def _render(name: str, content: Mapping[str, Any]) -> str:
    return pages.render(
        Path(__file__).parent / "templates" / name,
        {**content, "label": label, "span": span},
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


def latex(content: Mapping[str, Any]) -> str:
    """All tables of differences as LaTeX (packages booktabs and graphicx), one ``table*`` each."""
    out = [
        f"% {content['title']}; commit {content['environment'].get('commit', 'unknown')}",
        r"% needs \usepackage{booktabs,graphicx}",
    ]
    for table in content["tables"]:
        caption = (
            f"{sentence(table.title)}: percentage points, 95 % paired t interval over seeds below. Bold: significant "
            f"at 5 % after Holm's correction within an outcome over {', '.join(map(str, table.families))} comparisons."
        )
        suites = list(dict.fromkeys(s for s, _ in table.columns))
        columns = sorted(table.columns, key=lambda o: suites.index(o[0]))
        spans = [rf"\multicolumn{{{sum(s == o[0] for o in columns)}}}{{c}}{{{_escape(s)}}}" for s in suites]
        out += [
            "",
            r"\begin{table*}",
            r"\centering",
            rf"\caption{{{_escape(caption)}}}",
            rf"\label{{tab:{table.kind}-{table.regime}-{table.compat}}}",
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


def _escape(text: str) -> str:
    """Text with LaTeX's special characters escaped."""
    special = {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"}
    return "".join(special.get(c, f"\\{c}" if c in "&%$#_{}" else c) for c in text)


def _cell(c: Comparison | None) -> str:
    if c is None:
        return "--"
    value = points(c.value).replace("-", "$-$")
    value = value if c.verdict == "undecided" else rf"\textbf{{{value}}}"
    interval = "n/a" if c.low is None else f"[{points(c.low)}, {points(c.high)}]".replace("-", "$-$")
    return rf"\shortstack{{{value}\\{{\tiny {interval}}}}}"


def write_study_report(
    folder: str | os.PathLike, paths: Mapping[str, str | os.PathLike] | None = None, *, partial: bool = False
) -> tuple[dict[str, Any], list[Path]]:
    """Read the study in ``folder`` and write its report: (content, paths written).

    ``paths`` has the files of html, md, csv and latex that are wanted (default: all four in ``folder`` as report.*).
    ``results.csv``, one line per run and outcome, is always written beside the study. ``partial``: report although
    cells are missing. Raises DataError where the study cannot be read, UserError where a file cannot be written.
    """
    study = load_study(folder, partial)
    made = content(study)
    written = [write_csv(study.folder / "results.csv", table_rows(study))]
    for kind, path in (paths or {k: Path(folder) / name for k, name in FILES.items()}).items():
        if kind == "csv":
            write_csv(path, tables.comparison_rows(made["comparisons"]))
        else:
            write_text(Path(path), {"html": html, "md": markdown, "latex": latex}[kind](made))
        written.append(Path(path))
    return made, written
