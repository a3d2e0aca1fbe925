"""The demo's report: what came out, row by row, beside the random-init control. Its inputs: ``records``."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from vjepa_fast.evaluation import Row
from vjepa_fast.files import write_text
from vjepa_fast.study import pages
from vjepa_fast.study.demo import figures
from vjepa_fast.study.demo.records import ClipPicture, RunRecord, SuiteRecord

TEMPLATE = Path(__file__).parent / "templates" / "report.html.j2"
MOTION, APPEARANCE, PROBE = "motion8", "objects", "linear"  # axes of the trade-off: vertical, horizontal
VERDICTS = ("above", "below", "level")
KIND_NAMES = {"random": "control", "pixels": "control", "supervised": "supervised, small", "pretrained": "pretrained"}


def table(rows: Sequence[Row]) -> dict:
    """The pivot of the accuracy table: {"columns": [(suite, probe)], "lines": [(label, kind, [Row or None])]}."""
    cells = {(r.label, r.suite, "linear" if r.probe == "supervised" else r.probe): r for r in rows}
    suites = list(dict.fromkeys(r.suite for r in rows))
    columns = sorted(dict.fromkeys(k[1:] for k in cells), key=lambda c: suites.index(c[0]))
    kinds = {r.label: r.kind for r in rows}
    return {
        "columns": columns,
        "suites": [(s, sum(c[0] == s for c in columns)) for s in suites],
        "lines": [(label, kind, [cells.get((label, *c)) for c in columns]) for label, kind in kinds.items()],
    }


def statement(rows: Sequence[Row]) -> dict:
    """Which pretrained rows stand above, below or level with the random-init control by the 95 % interval.

    {"above": [...], "below": [...], "level": n, "compared": n, "expected": rows that would stand above by luck alone}.
    """
    compared = [r for r in rows if r.kind == "pretrained" and r.difference is not None]
    by = {v: [(f"{r.label}: {r.suite}, {r.probe}", r.difference) for r in compared if r.verdict == v] for v in VERDICTS}
    counts = {"level": len(by["level"]), "compared": len(compared), "expected": 0.025 * len(compared)}
    return {"above": by["above"], "below": by["below"], **counts}


def _long_run(committed: dict) -> dict:
    """Rows of the committed run by (suite, probe, encoder), and in how many seeds they stand above random init."""
    groups: dict[tuple, list] = {}
    for row in sorted(committed["rows"], key=lambda r: r["seed"]):
        groups.setdefault((row["suite"], row["probe"], row.get("encoder", "")), []).append(row)
    lines = [
        {"suite": suite, "probe": probe, "encoder": encoder, "rows": rows,
         "above": sum(r["difference_ci95"][0] > 0 for r in rows)}
        for (suite, probe, encoder), rows in groups.items()
    ]  # fmt: skip
    return {"lines": lines, "seeds": sorted({r["seed"] for r in committed["rows"]})}


def write_report(
    path: str | os.PathLike,
    *,
    title: str,
    runs: Sequence[RunRecord],
    rows: Sequence[Row],
    suites: Sequence[SuiteRecord],
    pictures: Sequence[ClipPicture] = (),
    committed: dict | None = None,
    environment: Mapping[str, str] = {},
    protocol: Sequence[str] = (),
) -> Path:
    """Write the report to ``path`` and return the path. Sections without material say so.

    ``rows`` have their differences from the control (`vjepa_fast.evaluation.against`); ``committed`` is what
    `load_committed` returns.

    Raises:
        UserError: ``path`` cannot be written.
    """
    probes: dict[str, dict] = {}  # of each suite: those of random init first, to show where it has no linear probe
    for r in sorted(rows, key=lambda r: r.kind != "random"):
        probes.setdefault(r.suite, {})[r.probe] = None
    probe_of = {s: PROBE if PROBE in probes[s] else next(iter(probes[s])) for s in dict.fromkeys(r.suite for r in rows)}
    content = {
        "title": title,
        "runs": runs,
        "suites": suites,
        "table": table(rows),
        "statement": statement(rows),
        "kind_names": KIND_NAMES,
        "environment": environment,
        "protocol": protocol,
        "loss_svg": figures.loss_curves(runs),
        "monitor_svg": figures.monitor_curves(runs),
        "dots_svg": figures.accuracy_dots(rows, probe_of),
        "tradeoff_svg": figures.tradeoff(rows, MOTION, APPEARANCE, PROBE),
        "motion": MOTION,
        "appearance": APPEARANCE,
        "probe": PROBE,
        "masks": [(p, figures.strips(p)) for p in pictures],
        "pcas": [(p, {k: figures.strip(v) for k, v in {"frames": p.frames, **p.maps}.items()}) for p in pictures],
        "setting_names": list(dict.fromkeys(key for run in runs for key in run.settings)),
        "committed": committed,
        "long_run": committed and _long_run(committed),
        "committed_svg": committed and figures.committed_curves(committed.get("curves", [])),
    }
    page = pages.render(TEMPLATE, content, percent=lambda x: f"{100 * x:.1f}", points=lambda x: f"{100 * x:+.1f}")
    write_text(Path(path), page, hint="choose another folder")
    return Path(path)
