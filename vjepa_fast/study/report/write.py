"""Writing a study's report: one self-contained HTML file, and the same numbers as Markdown, CSV and LaTeX."""

from __future__ import annotations

import functools
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vjepa_fast.files import write_text
from vjepa_fast.study import pages, stats
from vjepa_fast.study.records import BASELINE, Study, is_fewshot, load_study, some, table_rows, write_csv
from vjepa_fast.study.report import figures, sentences, tables
from vjepa_fast.study.report.latex import latex
from vjepa_fast.study.report.markdown import markdown
from vjepa_fast.study.report.sentences import name_of, points, span
from vjepa_fast.study.run.variants import COUNTED
from vjepa_fast.study.stats import MEAN, STUDENT

QUESTION = (
    "Does pretraining on mixed data improve few-shot recognition over single-dataset pretraining, and what does each "
    "objective trade away?"
)
FILES = {"html": "report.html", "md": "report.md", "csv": "report.csv", "latex": "report.tex"}
TEMPLATE = Path(__file__).parent / "templates" / "study.html.j2"


def content(study: Study) -> dict[str, Any]:
    """Everything the report says, computed once; all four forms are made of it."""
    comparisons, geometry = stats.all_comparisons(study), tables.geometry_table(study)
    found = stats.answer(comparisons, study.compat)
    by_kind = {kind: tables.delta_tables(comparisons, study, kind) for kind in stats.KINDS}
    families = {(c.kind, c.regime, c.compat, c.outcome, c.variant in COUNTED) for c in comparisons if c.variant != MEAN}
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
        "cost": tables.cost_table(study),
        "geometry": geometry,
        "environment": tables.environment_of(study),
        "families": len(families),
        "chances": tables.chances(study),
    }


def pictures(content: Mapping[str, Any]) -> dict[str, str | None]:
    """The report's plots by name (question_svg, forest_svg, ...) as SVG text; None where there is nothing to show."""
    study, comparisons = content["study"], content["comparisons"]

    def panels(kind: str, compat: str, few: bool | None = None) -> dict:
        found = [c for c in comparisons if (c.kind, c.compat) == (kind, compat)]
        shown = [o for o in study.outcomes if few is None or is_fewshot(o) is few]
        return {name_of(o): [c for c in found if c.outcome == o] for o in shown}

    order = [*(name for v in study.variants for name in (v, v + STUDENT)), MEAN]
    return {
        "question_svg": figures.forest(panels("regime", study.compat, True), order),
        "forest_svg": figures.forest(panels("baseline", study.compat), order),
        "modes_svg": figures.forest(panels("mode", "published"), order),
        "tradeoff_svg": figures.tradeoff(comparisons, study),
        "cost_svg": figures.cost(study),
        "curves_svg": figures.curves(study),
        "geometry_svg": figures.geometry(study),
    }


def html(content: Mapping[str, Any]) -> str:
    """The report as HTML, with the pictures inside."""
    study: Study = content["study"]
    minus = functools.partial(re.sub, r"(?<![\w.])-(?=\d)", "\N{MINUS SIGN}")
    shared, differ, lines = tables.settings_table(study)
    columns, ran = tables.coverage(study)
    temporal, appearance = tables.tradeoff_axes(study.outcomes)
    values = {
        **content,
        **pictures(content),
        "accuracy": {r: tables.accuracy_lines(study, r, study.compat) for r in study.regimes},
        "geometry_lines": tables.geometry_lines(content["geometry"]),
        "geometry_columns": tables.GEOMETRY_COLUMNS,
        "temporal": temporal,
        "appearance": appearance,
        "shared": shared,
        "differ": differ,
        "setting_lines": lines,
        "coverage_columns": columns,
        "coverage": ran,
        "shared_machine": max((c.cost.get("side_by_side") or 1 for c in study.cells.values()), default=1),
        "label": sentences.label,
    }
    filters = {
        "points": lambda x: minus(points(x)),
        "p_text": sentences.p_text,
        "minus": minus,
        "sentence": sentences.sentence,
    }
    return pages.render(TEMPLATE, values, filters, {"span": lambda low, high: minus(span(low, high))})


def write_study_report(
    folder: str | os.PathLike, paths: Mapping[str, str | os.PathLike] | None = None, *, partial: bool = False
) -> tuple[dict[str, Any], list[Path]]:
    """Read the study in ``folder`` and write its report: (content, paths written).

    ``paths`` has the files of html, md, csv and latex that are wanted (default: all four in ``folder`` as report.*).
    ``results.csv``, one line per run and outcome, is always written beside the study. ``partial``: report although
    cells are missing.

    Raises:
        DataError: the study cannot be read (see ``records.load_study``).
        UserError: a file cannot be written.
    """
    study = load_study(folder, partial)
    made = content(study)
    written = [write_csv(study.folder / "results.csv", table_rows(study))]
    for kind, path in (paths or {k: Path(folder) / name for k, name in FILES.items()}).items():
        path = Path(path)
        if kind == "csv":
            write_csv(path, tables.comparison_rows(made["comparisons"]))
        else:
            write_text(path, {"html": html, "md": markdown, "latex": latex}[kind](made))
        written.append(path)
    return made, written
