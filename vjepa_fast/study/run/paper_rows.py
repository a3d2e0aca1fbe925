"""What the paper's table has beside our probes: the published probes, and few-shot encoders that are tuned first."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vjepa_fast import __version__
from vjepa_fast.files import parse_json, write_json

if TYPE_CHECKING:
    from vjepa_fast.data import Manifest
    from vjepa_fast.evaluation import Row
    from vjepa_fast.models.vit import VisionTransformer


def paper_rows(
    label: str,
    job: Mapping[str, Any],
    encoder: VisionTransformer,
    which: str,
    suite: str,
    source: Mapping[str, Any],
    parts: Mapping[str, Manifest],
    ours: Callable[[], list[Row]],
) -> list[Row]:
    """Rows of a job's frozen encoder, ``which`` of its two, on one source of the suite ``paper``: those that ``ours()``
    gives, then the others. ``parts`` are its manifests.

    What is done is kept in the run's folder, so that a stopped run goes on after it.
    """
    made, common = {"ours": ours}, (label, job, encoder, suite)
    if source["task"]:
        made["published"] = partial(published_rows, *common, source["task"], parts)
    else:
        made |= {method: partial(tuned_rows, *common, method, parts) for method in job["evaluation"]["tune"]["methods"]}
    folder = Path(job["folder"]) / "runs" / job["key"] / "rows"
    identity = [__version__, job["config_hash"], job["evaluation"], {part: m.hash for part, m in parts.items()}]
    rows = []
    for name, make in made.items():
        rows += _kept(folder / f"{which}-{suite}-{name}.json", identity, make)
    return rows


def _kept(path: Path, identity: list, make: Callable[[], list[Row]]) -> list[Row]:
    """The rows in ``path``, where they are of this ``identity``; else those of ``make()``, which go there."""
    from vjepa_fast.evaluation import Row

    try:
        found = parse_json(path.read_text())
        if found["identity"] == identity:
            return [Row(**{**row, "hits": tuple(row["hits"])}) for row in found["rows"]]
    except (OSError, ValueError, KeyError, TypeError):
        pass  # none there, or damaged: made anew
    rows = make()
    value = {"identity": identity, "rows": [row.to_dict() for row in rows]}
    write_json(path, value, "free space and run the study again", indent=None)
    return rows


def published_rows(
    label: str, job: Mapping[str, Any], encoder: VisionTransformer, suite: str, task: str, parts: Mapping[str, Manifest]
) -> list[Row]:
    """The row of the published probe. Its features and tokens are kept in the run's folder until the row is made, so
    that a stopped run goes on with them, and removed then: all tokens of Diving-48 take 41 GB.
    """
    from vjepa_fast.evaluation.extract.shards import check_disk
    from vjepa_fast.evaluation.probes import PROBES
    from vjepa_fast.evaluation.run.encoders import Subject
    from vjepa_fast.evaluation.run.probe import ProbeProtocol, encoder_rows
    from vjepa_fast.evaluation.run.sources import open_sources

    how, cache = job["evaluation"], Path(job["folder"]) / "runs" / job["key"] / "published"
    workers = min(4, os.cpu_count() or 1)
    row = f"{'ucf101' if job['regime'] == 'single' else 'mixed'}_4gpu_{job['variant']}"  # epochs as it was scored
    protocol = ProbeProtocol(name="published", task=task, row=row, seed=how["seed"], workers=workers).settled()
    subject = Subject(job["key"], device=job["device"], cache_dir=cache)
    shown = protocol.parts(parts)
    if PROBES["published"].needs_of(protocol.known_task) == "tokens":
        check_disk(cache, protocol.token_bytes(encoder, sum(map(len, shown.values()))))
    sources = open_sources(shown, encoder, protocol, subject)
    rows = encoder_rows(label, job["kind"], encoder, shown, sources, protocol, subject, suite=suite)
    shutil.rmtree(cache, ignore_errors=True)
    return rows


def tuned_rows(
    label: str,
    job: Mapping[str, Any],
    encoder: VisionTransformer,
    suite: str,
    method: str,
    parts: Mapping[str, Manifest],
) -> list[Row]:
    """The last stage of a few-shot ``method`` that trains, on the episodes of the frozen rows."""
    from vjepa_fast.evaluation.fewshot.tuning import tune
    from vjepa_fast.evaluation.fewshot.tuning.methods import settings_of
    from vjepa_fast.evaluation.run.rows import tune_rows

    how = job["evaluation"]
    test = {k: how[k] for k in ("way", "queries", "episodes", "pooling")} | how["view"]
    settings = settings_of(method, how["tune"], **test, workers=min(4, os.cpu_count() or 1))
    of = parts["train"], parts.get("val"), parts["test"]
    tuned = tune(method, encoder, *of, settings=settings, seed=how["seed"], device=job["device"])
    last = list(tuned.test)[-1]
    made = tune_rows(tuned, label=label, kind=job["kind"], suite=suite)
    return [row for row in made if row.probe.startswith(f"{method} {last} ")]
