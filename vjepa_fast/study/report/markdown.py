"""A study's report as Markdown."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from vjepa_fast.study.records import Study
from vjepa_fast.study.report.sentences import label, name_of, points, sentence, span
from vjepa_fast.study.report.tables import GEOMETRY_COLUMNS, accuracy_lines, geometry_lines
from vjepa_fast.study.stats import Comparison


def markdown(content: Mapping[str, Any]) -> str:
    """The report as Markdown, of ``write.content``."""
    study: Study = content["study"]
    out = [f"# {content['title']}\n", f"**{content['question']}**\n", f"**{content['headline']}**\n"]
    out += [f"- {line}" for line in content["answer_lines"] + content["tradeoff_lines"]]
    out += [
        "\nDifferences are in percentage points, with the 95 % t interval over seeds in brackets.",
        "**above** and **below** are verdicts of the paired t test at 5 % after Holm's correction, else undecided.",
        "The CSV file also has the bootstrap intervals and the p-values.\n",
    ]
    if content["missing"]:
        out.append(
            f"**Incomplete: {len(content['missing'])} of {len(study.expected)} cells are missing** "
            f"({content['missing_text']}).\n"
        )
    for regime in study.regimes:
        out.append(
            f"## Accuracy, {regime}, {study.compat}\n\nPercent, mean over seeds (standard deviation over seeds).\n"
        )
        guess = ["chance", "", *(f"{100 * content['chances'][o]:.1f}" for o in study.outcomes)]
        lines = [guess] + [
            [
                v,
                str(n),
                *(
                    "" if x is None else f"{100 * x[0]:.1f}" + ("" if x[1] is None else f" ({100 * x[1]:.1f})")
                    for x in line
                ),
            ]
            for v, n, line in accuracy_lines(study, regime, study.compat)
        ]
        out.append(_grid(["variant", "seeds", *map(name_of, study.outcomes)], lines))
    for table in content["tables"]:
        families = ", ".join(map(str, table.families))
        out.append(f"## {sentence(table.title)}\n\nCorrected within an outcome over {families} comparisons.\n")
        lines = [[label(v, cells), *map(_cell, cells)] for v, cells in table.lines]
        out.append(_grid(["variant", *map(name_of, table.columns)], lines))
    out.append("## Cost per step\n")
    out.append(
        _grid(
            ["variant", "regime", "ms", "minus baseline", "peak MB", "minus baseline"],
            [
                [r["variant"], r["regime"], _number(r["step_ms"]), _number(r["ms_more"], "+"),
                 _number(r["peak_mb"], "", 0), _number(r["mb_more"], "+", 0)]
                for r in content["cost"]
            ],
        )
    )  # fmt: skip
    if content["geometry"]:
        out.append("## Geometry\n\nOf all levels together; in brackets the appearance and the dynamics half.\n")
        head = ["variant", "regime", *(name for name, _ in GEOMETRY_COLUMNS.values())]
        out.append(_grid(head, [[v, r, *map(_halves, cells)] for v, r, cells in geometry_lines(content["geometry"])]))
    out.append("## Where it ran\n")
    out += [f"- {k}: {v}" for k, v in content["environment"].items()]
    return "\n".join(out) + "\n"


def _grid(header: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """A Markdown table, first column left, others right."""
    rule = ["---", *("---:" for _ in header[1:])]
    return "\n".join("| " + " | ".join(row) + " |" for row in (header, rule, *lines)) + "\n"


def _cell(c: Comparison | None) -> str:
    if c is None:
        return ""
    verdict = "" if c.verdict == "undecided" else f" **{c.verdict}**"
    return f"{points(c.value)} ({span(c.low, c.high)}){verdict}"


def _halves(texts: tuple[str, ...]) -> str:
    return f"{texts[0]} ({texts[1]}, {texts[2]})"


def _number(x: float | None, sign: str = "", digits: int = 1) -> str:
    return "not measured" if x is None else f"{x:{sign}.{digits}f}"
