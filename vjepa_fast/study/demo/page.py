"""The demo's report: what came out, row by row, beside the random-init control. Its inputs: ``records``."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from vjepa_fast.evaluation import Row
from vjepa_fast.files import write_text
from vjepa_fast.study import pages
from vjepa_fast.study.demo import figures
from vjepa_fast.study.demo.records import MaskPicture, PcaPicture, RunRecord, SuiteRecord

TEMPLATE = Path(__file__).parent / "templates" / "report.html.j2"
KIND_NAMES = {"random": "control", "pixels": "control", "supervised": "supervised, small", "pretrained": "pretrained"}


def percent(value: float, digits: int = 1) -> str:
    """0.1234 as "12.3"."""
    return f"{100 * value:.{digits}f}"


def points(value: float) -> str:
    """0.0123 as "+1.2" (percentage points)."""
    return f"{100 * value:+.1f}"


def table(rows: Sequence[Row]) -> dict:
    """The pivot of the accuracy table: {"columns": [(suite, probe)], "lines": [(label, kind, [Row or None])]}."""
    columns = list(dict.fromkeys((r.suite, "linear" if r.probe == "supervised" else r.probe) for r in rows))
    suites = list(dict.fromkeys(suite for suite, _ in columns))
    columns = [c for s in suites for c in columns if c[0] == s]
    cells = {(r.label, r.suite, "linear" if r.probe == "supervised" else r.probe): r for r in rows}
    labels = {r.label: r.kind for r in rows}
    return {
        "columns": columns,
        "suites": [(s, sum(c[0] == s for c in columns)) for s in suites],
        "lines": [(label, kind, [cells.get((label, *c)) for c in columns]) for label, kind in labels.items()],
    }


def statement(rows: Sequence[Row]) -> dict:
    """Which pretrained rows stand above, below or level with the random-init control by the 95 % interval.

    {"above": [...], "below": [...], "level": n, "compared": n, "expected": rows that would stand above by luck alone}.
    """
    compared = [r for r in rows if r.kind == "pretrained" and r.difference is not None]
    name = "{r.label}: {r.suite}, {r.probe}".format
    return {
        "above": [(name(r=r), r.difference) for r in compared if r.verdict == "above"],
        "below": [(name(r=r), r.difference) for r in compared if r.verdict == "below"],
        "level": sum(r.verdict == "level" for r in compared),
        "compared": len(compared),
        "expected": 0.025 * len(compared),
    }


def committed_summary(committed: dict) -> dict:
    """Rows of the committed run by (suite, probe, encoder), and whether every seed stands above random init."""
    groups: dict[tuple, list] = {}
    for row in committed["rows"]:
        groups.setdefault((row["suite"], row["probe"], row.get("encoder", "")), []).append(row)
    lines = [
        {
            "suite": k[0],
            "probe": k[1],
            "encoder": k[2],
            "rows": sorted(v, key=lambda r: r["seed"]),
            "above": sum(r["difference_ci95"][0] > 0 for r in v),
        }
        for k, v in groups.items()
    ]
    return {"lines": lines, "seeds": sorted({r["seed"] for r in committed["rows"]})}


def write_report(
    path: str | os.PathLike,
    *,
    title: str,
    runs: Sequence[RunRecord],
    rows: Sequence[Row],
    suites: Sequence[SuiteRecord],
    mask_pictures: Sequence[MaskPicture] = (),
    pca_pictures: Sequence[PcaPicture] = (),
    committed: dict | None = None,
    environment: dict[str, str] | None = None,
    protocol: Sequence[str] = (),
    motion: str = "motion8",
    appearance: str = "objects",
    probe: str = "linear",
) -> Path:
    """Write the report to ``path`` and return the path. Sections without material say so.

    ``rows`` have their differences from the control (`vjepa_fast.evaluation.against`); ``committed`` is what
    `load_committed` returns. The trade-off has the suite ``motion`` on its vertical axis and ``appearance`` on its
    horizontal one.

    Raises:
        UserError: ``path`` cannot be written.
    """
    probe_of = {
        s: (
            probe
            if any(r.suite == s and r.probe == probe for r in rows)
            else next((r.probe for r in rows if r.suite == s and r.kind == "random"), rows[0].probe)
        )
        for s in dict.fromkeys(r.suite for r in rows)
    }
    content = {
        "title": title,
        "runs": runs,
        "suites": suites,
        "table": table(rows),
        "statement": statement(rows),
        "kind_names": KIND_NAMES,
        "environment": environment or {},
        "protocol": protocol,
        "loss_svg": figures.loss_curves(runs),
        "monitor_svg": figures.monitor_curves(runs),
        "dots_svg": figures.accuracy_dots(rows, list(probe_of), probe_of),
        "tradeoff_svg": figures.tradeoff(rows, motion, appearance, probe),
        "motion": motion,
        "appearance": appearance,
        "probe": probe,
        "masks": [(p, figures.mask_strips(p)) for p in mask_pictures],
        "pcas": [(p, figures.pca_strips(p)) for p in pca_pictures],
        "setting_names": list(dict.fromkeys(key for run in runs for key in run.settings)),
        "committed": committed,
        "long_run": committed_summary(committed) if committed else None,
        "committed_svg": figures.committed_curves(committed.get("curves", [])) if committed else None,
    }
    page = pages.render(TEMPLATE, content, {"percent": percent, "points": points})
    path = Path(path)
    write_text(path, page, hint="choose another folder")
    return path
