"""What comes out of the demo: rows of accuracy beside the random-init control, ``results.json`` and ``report.html``."""

from __future__ import annotations

import os
import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vjepa_fast.evaluation import Row, against
from vjepa_fast.files import read_json, write_json, write_text
from vjepa_fast.study import pages
from vjepa_fast.study.demo import figures
from vjepa_fast.study.demo.plan import SUITE_TEXT
from vjepa_fast.study.demo.records import ClipPicture, RunRecord, SuiteRecord, load_committed
from vjepa_fast.study.records import read_metrics
from vjepa_fast.study.run.training import settings_text

if TYPE_CHECKING:
    from vjepa_fast.study.demo.graph import Demo

TEMPLATE = Path(__file__).parent / "templates" / "report.html.j2"
UP, RIGHT, PROBE = (
    ("order", "linear"),
    ("fewshot", "5-shot"),
    "linear",
)  # axes of the trade-off, and the probe of the dots
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

    {"above": [...], "below": [...], "level": n, "compared": n, "expected": rows that would stand above by luck alone,
    "novel": rows above on novel classes, None where none was compared}.
    """
    compared = [r for r in rows if r.kind == "pretrained" and r.difference is not None]
    by = {v: [(f"{r.label}: {r.suite}, {r.probe}", r.difference) for r in compared if r.verdict == v] for v in VERDICTS}
    counts = {"level": len(by["level"]), "compared": len(compared), "expected": 0.025 * len(compared)}
    few = [r.verdict for r in compared if r.suite == RIGHT[0]]
    novel = few.count("above") if few else None
    return {"above": by["above"], "below": by["below"], "novel": novel, **counts}


def _long_run(committed: dict) -> dict:
    """Rows of the committed run by (suite, probe, encoder), and in how many seeds they stand above random init."""
    groups: dict[tuple, list] = {}
    for row in sorted(committed["rows"], key=lambda r: r["seed"]):
        groups.setdefault((row["suite"], row["probe"], row.get("encoder", "")), []).append(row)
    lines = [
        {
            "suite": suite,
            "probe": probe,
            "encoder": encoder,
            "rows": rows,
            "above": sum(r["difference_ci95"][0] > 0 for r in rows),
        }
        for (suite, probe, encoder), rows in groups.items()
    ]
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
    `load_committed` returns. Raises UserError where ``path`` cannot be written.
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
        "tradeoff_svg": figures.tradeoff(rows, UP, RIGHT),
        "up": " ".join(UP),
        "right": " ".join(RIGHT),
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


def rows_of(demo: Demo, results: Mapping[str, Any]) -> list[Row]:
    """All rows, controls first, each pretrained one set against random init. ``results``: of the tasks, by name."""
    names = [
        "controls",
        *(f"supervised-{n}" for n in demo.evaluated),
        *(f"evaluate-{run.key}" for run in demo.plan.runs),
    ]
    rows = [Row(**{**r, "hits": tuple(r["hits"])}) for name in names for r in results[name]]
    rows.sort(key=lambda r: demo.evaluated.index(r.suite))  # stable: the order of encoders stays
    return against(rows, [r for r in rows if r.kind == "random"], seed=demo.plan.seed)


def write(demo: Demo, results: Mapping[str, Any], rows: Sequence[Row], seconds: float) -> Path:
    """Write ``results.json`` and ``report.html``; returns the path of the report."""
    import torch

    from vjepa_fast import __version__

    plan = demo.plan
    environment = {
        "device": plan.device,
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, {platform.system()}",
        "processes": f"{demo.workers} at once, {demo.threads} thread{'s' if demo.threads > 1 else ''} each",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "vjepa_fast": __version__,
        "this invocation took": f"{seconds / 60:.1f} minutes" if seconds else "nothing was left to do",
    }
    content = {"format": 1, "plan": asdict(plan), "environment": environment, "rows": [r.to_dict() for r in rows]}
    write_json(demo.folder / "results.json", content)
    runs = []
    for run in plan.runs:
        metrics, settings = (
            read_metrics(demo.folder / "runs" / run.key),
            settings_text(demo.configs[run.key], run.weights),
        )
        runs.append(RunRecord(run.name, run.objective, run.regime, metrics, settings))
    suites = []
    for name in demo.evaluated:
        classes = len(read_json(demo.folder / "suites" / name / "classes.json"))
        train, val, test = (plan.suites[name].get(part, 0) for part in ("train", "val", "test"))
        chance = next(r.chance for r in rows if r.suite == name)
        suites.append(SuiteRecord(name, SUITE_TEXT[name], train, val, test, classes, chance))
    return write_report(
        demo.folder / "report.html",
        title="Video-JEPA on a laptop",
        runs=runs,
        rows=rows,
        suites=suites,
        pictures=_pictures(results["pictures"]),
        committed=load_committed(),
        environment=environment,
        protocol=_protocol(demo),
    )


def _pictures(path: str) -> list[ClipPicture]:
    """Of the file that ``tasks.pictures`` wrote."""
    import numpy as np

    with np.load(path) as arrays:
        found: dict[str, dict] = {}
        for key in arrays.files:
            suite, kind, *label = key.split("/", 2)
            clip = found.setdefault(suite, {"title": f"A test clip of {suite}", "maps": {}})
            (clip["maps"] if label else clip)[label[0] if label else kind] = arrays[key]
    return [ClipPicture(**clip) for clip in found.values()]


def _protocol(demo: Demo) -> list[str]:
    plan, view = demo.plan, demo.view
    pooling = {
        "tdiff": "as mean and deviation over all tokens, mean change between time steps, and change from first to last",
        "time": "averaged over space, the time steps side by side",
        "mean": "averaged over all tokens",
        "meanstd": "mean and standard deviation over all tokens",
    }[plan.pooling]
    return [
        f"One protocol for every encoder: centre clip of {view['num_frames']} frames, step {view['frame_step']}, "
        f"{view['crop_size']} px; patch features of the last level {pooling}; encoder frozen.",
        "Pretraining sees the training parts without labels. Validation and test clips are rendered apart and never "
        "trained on.",
        "Random init is the very weights that the runs start from. Raw pixels are the clip averaged down to 4 x 8 x 8 "
        "x RGB.",
        f"The supervised row is small: {plan.supervised_steps} steps of batch {plan.supervised_batch} on the probe's "
        "training part, from scratch; for few-shot on the base classes. It is a reference for what labels give at this "
        "size, not a ceiling.",
        f"Few-shot: 5-way episodes ({plan.episodes} of them, {plan.queries} queries per class) on novel classes, "
        "nearest prototype by cosine of features standardised by the base classes, of the pooling that reads the "
        "validation classes best, the same rule for every encoder. The interval beside an accuracy is "
        "the usual one over episodes; a difference is judged over query clips, which is wider.",
        "Target is the moving average (EMA) of the weights, student the weights that the optimiser moves. Early in a "
        "run the target still is half its random start.",
    ]
