"""What comes out of the demo: rows of accuracy, ``results.json`` and ``report.html``."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vjepa_fast.evaluation import Row, against
from vjepa_fast.files import write_json
from vjepa_fast.study.demo import records
from vjepa_fast.study.demo.page import write_report
from vjepa_fast.study.demo.plan import SUITE_TEXT, DemoPlan
from vjepa_fast.study.records import read_metrics
from vjepa_fast.study.run.training import settings_text

if TYPE_CHECKING:
    from vjepa_fast.study.demo.graph import Demo


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
    plan = demo.plan
    environment = _environment(demo.workers, demo.threads, plan.device, seconds)
    content = {"format": 1, "plan": asdict(plan), "environment": environment, "rows": [r.to_dict() for r in rows]}
    write_json(demo.folder / "results.json", content)
    return write_report(
        demo.folder / "report.html",
        title="Video-JEPA on a laptop",
        runs=[
            records.RunRecord(
                run.name,
                run.objective,
                run.regime,
                read_metrics(demo.folder / "runs" / run.key),
                settings_text(demo.configs[run.key], run.weights),
            )
            for run in plan.runs
        ],
        rows=rows,
        suites=[_suite(demo, name, rows) for name in demo.evaluated],
        pictures=_pictures(results["pictures"]),
        committed=records.load_committed(),
        environment=environment,
        protocol=_protocol(plan, demo.view),
    )


def _suite(demo: Demo, name: str, rows: Sequence[Row]) -> records.SuiteRecord:
    sizes = demo.plan.suites[name]
    chance = next(r.chance for r in rows if r.suite == name)
    classes = len(json.loads((demo.folder / "suites" / name / "classes.json").read_text()))
    parts = sizes.get("train", 0), sizes.get("val", 0), sizes["test"]
    return records.SuiteRecord(name, SUITE_TEXT[name], *parts, classes, chance)


def _pictures(path: str) -> list[records.ClipPicture]:
    """Of the file that ``tasks.pictures`` wrote."""
    import numpy as np

    with np.load(path) as arrays:
        found: dict[str, dict] = {}
        for key in arrays.files:
            suite, kind, *label = key.split("/", 2)
            clip = found.setdefault(suite, {"title": f"A test clip of {suite}", "maps": {}})
            (clip["maps"] if label else clip)[label[0] if label else kind] = arrays[key]
    return [records.ClipPicture(**clip) for clip in found.values()]


def _environment(workers: int, threads: int, device: str, seconds: float) -> dict[str, str]:
    import torch

    from vjepa_fast import __version__

    took = f"{seconds / 60:.1f} minutes" if seconds else "nothing was left to do"
    return {
        "device": device,
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, {platform.system()}",
        "processes": f"{workers} at once, {threads} thread{'s' if threads > 1 else ''} each",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "vjepa_fast": __version__,
        "this invocation took": took,
    }


def _protocol(plan: DemoPlan, view: Mapping[str, int]) -> list[str]:
    pooling = {
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
        "nearest prototype by cosine of features centred by the base classes' mean. The interval beside an accuracy is "
        "the usual one over episodes; a difference is judged over query clips, which is wider.",
        "Target is the moving average (EMA) of the weights, student the weights that the optimiser moves. Early in a "
        "run the target still is half its random start.",
    ]
