"""A study's tables of differences as LaTeX."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from vjepa_fast.study.report.sentences import label, points, sentence
from vjepa_fast.study.stats import MEAN, Comparison


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
            "", r"\begin{table*}", r"\centering", rf"\caption{{{_escape(caption)}}}",
            rf"\label{{tab:{table.kind}-{table.regime}-{table.compat}}}", r"\resizebox{\linewidth}{!}{%",
            rf"\begin{{tabular}}{{l{'r' * len(columns)}}}", r"\toprule", rf" & {' & '.join(spans)} \\",
            rf"variant & {' & '.join(_escape(p) for _, p in columns)} \\", r"\midrule",
        ]  # fmt: skip
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
