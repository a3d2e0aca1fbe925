"""A frozen encoder on the suites of a study or of the demo: accuracy rows, and the geometry of its features."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vjepa_fast.study.run.clips import load_clips

if TYPE_CHECKING:
    from vjepa_fast.data import Manifest
    from vjepa_fast.evaluation import ClipSet, Row


def evaluate(job: Mapping[str, Any], encoder, which: str = "target_encoder") -> tuple[list[Row], list[dict]]:
    """(accuracy rows, geometry rows) of a job's frozen encoder on every source of the study."""
    from vjepa_fast import data
    from vjepa_fast.study.instrument.read import How, suite_rows

    how, rows = job["evaluation"], []
    asked = {k: how[k] for k in ("pooling", "way", "queries", "episodes", "seed")}
    label = job["variant"].replace("_", " ") if job["kind"] == "random" else f"{job['variant']} {job['regime']}"
    label += " (published)" if job["compat"] == "published" else ""
    label += ", student" if which == "encoder" else ""
    geometry = None
    for suite, source in job["sources"].items():
        if "clips" in source:
            parts, where = load_clips(source["clips"], suite), {"cache_dir": None, "workers": 0}
        else:
            parts = {part: data.load_manifest(path) for part, path in source["manifests"].items()}
            cache = str(Path(job["folder"]) / "runs" / job["key"] / "features")
            where = {"cache_dir": cache, "workers": min(4, os.cpu_count() or 1)}
        where |= {"device": job["device"], "batch_size": 32, **how["view"]}
        if geometry is None:  # of the first suite's test clips
            geometry = _geometry(job, encoder, which, parts["test"])
        few = source["kind"] == "fewshot"
        rows += suite_rows(label, job["kind"], suite, encoder, parts, few, How(**asked, where=where))
    return rows, geometry or []


def _geometry(job: Mapping[str, Any], encoder, which: str, source: ClipSet | Manifest) -> list[dict]:
    """Collapse figures of the encoder on at most so many clips of ``source``."""
    import numpy as np

    from vjepa_fast.evaluation import ClipSet, decode_clips, geometry_rows

    how = job["evaluation"]
    limit = how["geometry"]["max_clips"]
    if not isinstance(source, ClipSet):
        chosen = np.sort(np.random.default_rng(how["seed"]).permutation(len(source))[:limit])
        few = dataclasses.replace(source, paths=[source.paths[i] for i in chosen], labels=source.labels[chosen])
        source = decode_clips(few, **how["view"])
    return geometry_rows(
        encoder, source, label=which, seed=how["seed"], batch_size=32, device=job["device"], **how["geometry"]
    )
