"""What the paper's table has beside our probes: the published probes, and few-shot encoders that are tuned first."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vjepa_fast.data import Manifest
    from vjepa_fast.evaluation import Row
    from vjepa_fast.models.vit import VisionTransformer


def paper_rows(
    label: str,
    job: Mapping[str, Any],
    encoder: VisionTransformer,
    suite: str,
    source: Mapping[str, Any],
    parts: Mapping[str, Manifest],
) -> list[Row]:
    """Rows of a job's frozen encoder on one source of the suite ``paper``; ``parts`` are its manifests."""
    if source.get("task"):
        return published_rows(label, job, encoder, suite, source["task"], parts)
    return tuned_rows(label, job, encoder, suite, parts) if source["kind"] == "fewshot" else []


def published_rows(
    label: str, job: Mapping[str, Any], encoder: VisionTransformer, suite: str, task: str, parts: Mapping[str, Manifest]
) -> list[Row]:
    """The row of the published probe. Its features and tokens are kept in the run's folder until the row is made, so
    that a stopped run goes on with them, and removed then: all tokens of Diving-48 take 41 GB.
    """
    from vjepa_fast.evaluation.run.encoders import Subject
    from vjepa_fast.evaluation.run.probe import ProbeProtocol, encoder_rows
    from vjepa_fast.evaluation.run.sources import open_sources

    how, cache = job["evaluation"], Path(job["folder"]) / "runs" / job["key"] / "published"
    workers = min(4, os.cpu_count() or 1)
    row = f"{'ucf101' if job['regime'] == 'single' else 'mixed'}_4gpu_{job['variant']}"  # epochs as it was scored
    protocol = ProbeProtocol(name="published", task=task, row=row, seed=how["seed"], workers=workers).settled()
    subject = Subject(job["key"], device=job["device"], cache_dir=cache)
    shown = protocol.parts(parts)
    sources = open_sources(shown, encoder, protocol, subject)
    rows = encoder_rows(label, job["kind"], encoder, shown, sources, protocol, subject, suite=suite)
    shutil.rmtree(cache, ignore_errors=True)
    return rows


def tuned_rows(
    label: str, job: Mapping[str, Any], encoder: VisionTransformer, suite: str, parts: Mapping[str, Manifest]
) -> list[Row]:
    """The last stage of every few-shot method that the study tunes by, on the episodes of the frozen rows."""
    from vjepa_fast.evaluation.fewshot.tuning import tune
    from vjepa_fast.evaluation.fewshot.tuning.methods import settings_of
    from vjepa_fast.evaluation.run.rows import tune_rows

    how, rows = job["evaluation"], []
    options = how["tune"]
    test = {k: how[k] for k in ("way", "queries", "episodes", "pooling")} | how["view"]
    test["workers"] = min(4, os.cpu_count() or 1)
    for method in options["methods"]:
        settings = settings_of(method, options, **test)
        tuned = tune(
            method,
            encoder,
            *(parts["train"], parts.get("val"), parts["test"]),
            settings=settings,
            seed=how["seed"],
            device=job["device"],
        )
        last = list(tuned.test)[-1]
        made = tune_rows(tuned, label=label, kind=job["kind"], suite=suite)
        rows += [r for r in made if r.probe.startswith(f"{method} {last} ")]
    return rows
