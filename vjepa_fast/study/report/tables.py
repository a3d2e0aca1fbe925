"""The tables of a study's report as plain data, and as Markdown, LaTeX and CSV: one set of numbers, four forms."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from vjepa_fast.study.records import BASELINE, RANDOM, Study
from vjepa_fast.study.stats import ALPHA, KINDS, MEAN, STUDENT, Comparison


@dataclass(frozen=True)
class DeltaTable:
    """Differences of one kind, regime and mode: a line per variant, a column per outcome (suite, probe)."""

    kind: str
    regime: str
    compat: str
    columns: list[tuple[str, str]]
    lines: list[tuple[str, list[Comparison | None]]]

    @property
    def title(self) -> str:
        """What is subtracted from what, regime and mode."""
        where = {"control": (), "mode": (self.regime,), "regime": (self.compat,)}.get(
            self.kind, (self.regime, self.compat)
        )
        return ", ".join((KINDS[self.kind], *where))

    @property
    def families(self) -> list[int]:
        """Sizes of the families that the tests of this table are corrected in."""
        return sorted({c.family for _, cells in self.lines for c in cells if c is not None and c.variant != MEAN})


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


def delta_tables(comparisons: list[Comparison], study: Study, kind: str) -> list[DeltaTable]:
    """The comparisons of one kind, a table per regime and mode; variants in the order of the plan, their mean last. The
    control has one table with a line per regime and mode.
    """
    out = []
    found = [c for c in comparisons if c.kind == kind]
    if kind == "control" and found:
        by = {(f"{c.regime}, {c.compat}", c.outcome): c for c in found}
        names = dict.fromkeys(name for name, _ in by)
        return [
            DeltaTable(
                kind, "all", "all", study.outcomes, [(n, [by.get((n, o)) for o in study.outcomes]) for n in names]
            )
        ]
    for regime, compat in dict.fromkeys((c.regime, c.compat) for c in found):
        here = {(c.variant, c.outcome): c for c in found if (c.regime, c.compat) == (regime, compat)}
        order = [name for v in study.variants for name in (v, v + STUDENT)] + [MEAN]
        variants = [v for v in order if any(k[0] == v for k in here)]
        lines = [(v, [here.get((v, o)) for o in study.outcomes]) for v in variants]
        out.append(DeltaTable(kind, regime, compat, study.outcomes, lines))
    return out


def accuracy_lines(study: Study, regime: str, compat: str) -> list[tuple[str, int, list[tuple | None]]]:
    """(variant, seeds, [(mean, std over seeds or None) per outcome]) of a regime, random init first."""
    out = []
    for variant in (RANDOM, *study.variants):
        cells = list(study.runs(variant, regime, compat).values())
        if not cells:
            continue
        values = [[c.rows[o].accuracy for c in cells if o in c.rows] for o in study.outcomes]
        line = [(float(np.mean(v)), float(np.std(v, ddof=1)) if len(v) > 1 else None) if v else None for v in values]
        out.append((variant, len(cells), line))
    return out


def chances(study: Study) -> dict[tuple[str, str], float]:
    """What guessing gives, per outcome (``load_study`` holds all cells to one value)."""
    rows = [cell.rows for cell in study.cells.values()]
    return {o: next(r[o].chance for r in rows if o in r) for o in study.outcomes}


def comparison_rows(comparisons: list[Comparison]) -> list[dict]:
    """Flat dicts for CSV, differences in percentage points."""

    def pp(x):
        return None if x is None else round(100 * x, 4)

    return [
        {
            "comparison": KINDS[c.kind], "variant": c.variant, "regime": c.regime, "compat": c.compat, "suite": c.suite,
            "probe": c.probe, "minus": c.against, "seeds": len(c.seeds), "accuracy": pp(c.levels[0]),
            "accuracy_subtracted": pp(c.levels[1]), "delta_points": pp(c.value),
            "t_low": pp(c.low), "t_high": pp(c.high),
            "bootstrap_low": pp(c.boot_low), "bootstrap_high": pp(c.boot_high),
            "p": None if c.p is None else float(f"{c.p:.4g}"),
            "p_holm": None if c.p_holm is None else float(f"{c.p_holm:.4g}"), "family": c.family, "verdict": c.verdict,
            "note": c.note, "deltas_by_seed": " ".join(f"{s}:{100 * d:.4f}" for s, d in zip(c.seeds, c.deltas)),
        }
        for c in comparisons
    ]  # fmt: skip


# ---------------------------------------------------------------- Markdown


def _grid(header: list[str], lines: list[list[str]]) -> str:
    """A Markdown table, first column left, others right."""
    rule = ["---", *("---:" for _ in header[1:])]
    return "\n".join("| " + " | ".join(row) + " |" for row in (header, rule, *lines)) + "\n"


def _cell_markdown(c: Comparison | None) -> str:
    if c is None:
        return ""
    verdict = "" if c.verdict == "undecided" else f" **{c.verdict}**"
    return f"{points(c.value)} ({span(c.low, c.high)}){verdict}"


def markdown(content: dict) -> str:
    """The report as Markdown, from what ``study_report.content`` gives."""
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
        lines = [[label(v, cells), *map(_cell_markdown, cells)] for v, cells in table.lines]
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


def label(variant: str, cells: list[Comparison | None]) -> str:
    """The variant, and what stands in where its own counterpart did not run."""
    stand_in = {c.against for c in cells if c is not None and c.against.endswith(", intended")}
    return f"{variant} (minus {stand_in.pop()})" if stand_in else variant


GEOMETRY_COLUMNS = {
    "rankme": ("RankMe", 1), "lidar": ("LiDAR", 1), "alpha_req": ("alpha-ReQ", 2), "feature_std": ("feature std", 3),
    "mean_cosine": ("mean cosine", 3),
}  # fmt: skip


def geometry_lines(table: list[dict]) -> list[tuple[str, str, list[tuple[str, str, str]]]]:
    """(variant, regime, [text of (whole, appearance half, dynamics half) per figure]), all levels together."""
    found = {(r["variant"], r["regime"], r["subspace"]): r for r in table if r["level"] == "all"}

    def text(variant, regime, subspace, key, digits) -> str:
        value = found.get((variant, regime, subspace), {}).get(key)
        return "n/a" if value is None else f"{value:.{digits}f}"

    return [
        (v, r, [tuple(text(v, r, s, key, digits) for s in ("all", "appearance", "dynamics"))
                for key, (_, digits) in GEOMETRY_COLUMNS.items()])
        for v, r in dict.fromkeys(k[:2] for k in found)
    ]  # fmt: skip


def _halves(texts: tuple[str, str, str]) -> str:
    return f"{texts[0]} ({texts[1]}, {texts[2]})"


def _number(x: float | None, sign: str = "", digits: int = 1) -> str:
    return "not measured" if x is None else f"{x:{sign}.{digits}f}"


# ---------------------------------------------------------------- LaTeX


def latex_escape(text: str) -> str:
    """Text with LaTeX's special characters escaped."""
    special = {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"}
    return "".join(special.get(c, f"\\{c}" if c in "&%$#_{}" else c) for c in text)


def _cell_latex(c: Comparison | None) -> str:
    if c is None:
        return "--"
    value = points(c.value).replace("-", "$-$")
    value = value if c.verdict == "undecided" else rf"\textbf{{{value}}}"
    interval = "n/a" if c.low is None else f"[{points(c.low)}, {points(c.high)}]".replace("-", "$-$")
    return rf"\shortstack{{{value}\\{{\tiny {interval}}}}}"


def latex(content: dict) -> str:
    """All tables of differences as LaTeX (packages booktabs and graphicx), one ``table*`` each."""
    out = [
        f"% {content['title']}; commit {content['environment'].get('commit', 'unknown')}",
        r"% needs \usepackage{booktabs,graphicx}",
    ]
    for table in content["tables"]:
        families = ", ".join(map(str, table.families))
        caption = (
            f"{sentence(table.title)}: percentage points, 95 % paired t interval over seeds below. Bold: "
            f"significant at 5 % after Holm's correction within an outcome over {families} comparisons."
        )
        suites = list(dict.fromkeys(s for s, _ in table.columns))
        spans = [(s, [o for o in table.columns if o[0] == s]) for s in suites]
        columns = [o for _, group in spans for o in group]
        head = " & ".join(rf"\multicolumn{{{len(g)}}}{{c}}{{{latex_escape(s)}}}" for s, g in spans)
        order = [table.columns.index(o) for o in columns]
        out += [
            "", r"\begin{table*}", r"\centering", rf"\caption{{{latex_escape(caption)}}}",
            rf"\label{{tab:{table.kind}-{table.regime}-{table.compat}}}", r"\resizebox{\linewidth}{!}{%",
            rf"\begin{{tabular}}{{l{'r' * len(columns)}}}", r"\toprule", rf" & {head} \\",
            rf"variant & {' & '.join(latex_escape(p) for _, p in columns)} \\", r"\midrule",
        ]  # fmt: skip
        for variant, cells in table.lines:
            if variant == MEAN:
                out.append(r"\midrule")
            name = latex_escape(label(variant, cells))
            out.append(rf"{name} & {' & '.join(_cell_latex(cells[i]) for i in order)} \\")
        out += [r"\bottomrule", r"\end{tabular}}", r"\end{table*}"]
    return "\n".join(out) + "\n"


def settings_table(study: Study) -> tuple[dict, list[str], list[tuple[str, dict]]]:
    """(settings that all runs share, names of those that differ, [("variant, regime, mode", settings)]), one seed."""
    lines = []
    for variant in study.variants:
        for regime in study.regimes:
            for compat in study.compats:
                cells = list(study.runs(variant, regime, compat).values())
                if cells and cells[0].settings:
                    text = {k: str(v) for k, v in cells[0].settings.items() if k != "seed"}
                    lines.append((f"{variant}, {regime}" + (f", {compat}" if len(study.compats) > 1 else ""), text))
    names = list(dict.fromkeys(k for _, s in lines for k in s))
    differ = [k for k in names if len({s.get(k) for _, s in lines}) > 1]
    shared = {k: lines[0][1][k] for k in names if k not in differ}
    return shared, differ, lines


def coverage(study: Study) -> tuple[list[tuple[str, str]], list[tuple[str, list[str]]]]:
    """What ran: columns (regime, mode), and per variant "evaluated of planned" in each, empty where none was."""
    from vjepa_fast.study.records import split_key

    split = {k: split_key(k) for k in study.expected}
    columns = list(dict.fromkeys((r, c) for _, r, c, _ in split.values()))
    lines = []
    for variant in [RANDOM, BASELINE, *study.planned()]:
        texts = []
        for column in columns:
            keys = [k for k, (v, r, c, _) in split.items() if v == variant and (r, c) == column]
            texts.append(f"{sum(k in study.cells for k in keys)} of {len(keys)}" if keys else "")
        if any(texts) and variant not in [name for name, _ in lines]:
            lines.append((variant, texts))
    return columns, lines
