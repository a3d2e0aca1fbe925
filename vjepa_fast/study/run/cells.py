"""One run of the study from its configuration to its cell: train (or go on), evaluate the frozen encoder, write JSON.

A job is a plain dict, so that it can be sent to another process or machine:
    {"key", "variant", "regime", "compat", "seed", "kind": "pretrained" | "random", "config": dict, "config_hash",
     "folder": of the study, "sources": suites.*.sources(), "evaluation": suites.*.evaluation(), "device",
     "settings": {text: text}, "side_by_side": runs on the machine at once, "processes": per run (torchrun if > 1)}

``run``, ``done`` and ``fail`` are what ``study.jobs`` needs of it.
"""

from __future__ import annotations

import hashlib
import json
import os
import statistics
import time
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from vjepa_fast.config import Config
from vjepa_fast.errors import UserError
from vjepa_fast.files import parse_json, read_json, write_text
from vjepa_fast.study.records import FORMAT, read_metrics
from vjepa_fast.study.run.evaluate import evaluate
from vjepa_fast.study.run.training import train, train_under_torchrun

HINT = "free space and run the study again"
POINTS = 200  # of a learning curve


def cell_path(folder: str | os.PathLike, key: str) -> Path:
    """Where the cell of a run is written."""
    return Path(folder) / "cells" / f"{key}.json"


def error_path(folder: str | os.PathLike, key: str) -> Path:
    """Where the reason is written why a run has no cell."""
    return Path(folder) / "cells" / f"{key}.error.txt"


def config_hash(config: dict, processes: int = 1) -> str:
    """sha256 over what decides the outcome of a run: the configuration without paths, device and threads, and the
    number of processes, each of which adds a batch to a step.
    """
    value = {k: v for k, v in config.items() if k not in ("folder", "runtime")}
    value["data"] = {k: v for k, v in config["data"].items() if k not in ("datasets", "num_workers", "pin_mem")}
    value["dtype"] = config["runtime"]["dtype"]
    return _hash({**value, "processes": processes} if processes > 1 else value)


def control_hash(config: dict) -> str:
    """The same of a random-init control, whose weights and clips do not depend on how anything is trained."""
    data = {k: config["data"][k] for k in ("crop_size", "patch_size", "tubelet_size")}
    data["dataset_fpcs"] = max(config["data"]["dataset_fpcs"])
    return _hash({"model": config["model"], "seed": config["seed"], "data": data})


def _hash(value: dict) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def read_cell(folder: str | os.PathLike, key: str) -> dict | None:
    """The finished cell of that key; None where there is none or the file is damaged."""
    try:
        found = parse_json(cell_path(folder, key).read_text())
        return found if found["format"] == FORMAT and found["rows"] else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def done(job: Mapping[str, Any]) -> bool:
    """Whether the job's cell is there."""
    return read_cell(job["folder"], job["key"]) is not None


def run(job: Mapping[str, Any]) -> dict:
    """Train, evaluate and write the cell of ``job``; returns it. Raises what training and evaluation raise."""
    import torch

    from vjepa_fast import config as configs
    from vjepa_fast.evaluation import random_encoder
    from vjepa_fast.models import load_encoder
    from vjepa_fast.trainer.run_folder import versions

    start, cfg, students = time.time(), configs.from_dict(job["config"]), []
    if job["kind"] == "random":
        rows, geometry = evaluate(job, random_encoder(cfg).to(job["device"]))
        cost, curve = (
            {"step_ms": None, "peak_mb": None, "steps": 0, "minutes": 0.0, "flops": 0},
            {"step": [], "loss": []},
        )
        dtype = torch.float32 if cfg.runtime.dtype == "float32" else torch.bfloat16
        found_on = versions(torch.device(job["device"]), dtype)
    else:
        checkpoint = _checkpoint(job)
        rows, geometry = evaluate(job, load_encoder(checkpoint, which="target_encoder", device=job["device"]))
        if cfg.compat == "published" and cfg.target.mode == "online":
            # the published code evaluates a target left at its random start: show what was trained beside it
            student = load_encoder(checkpoint, which="encoder", device=job["device"])
            students, more = evaluate(job, student, "encoder")
            geometry += more
        cost, curve = of_metrics(cfg, read_metrics(cfg.folder), job["processes"])
        found_on = read_json(Path(cfg.folder) / "versions.json")
    cell = {
        "format": FORMAT,
        **{k: job[k] for k in ("key", "variant", "regime", "compat", "seed", "kind")},
        "encoder": "target_encoder",
        "rows": [r.to_dict() for r in rows],
        "student_rows": [r.to_dict() for r in students],
        "geometry": geometry,
        "cost": {**cost, "side_by_side": job["side_by_side"]},
        "curve": curve,
        "config_hash": job["config_hash"],
        "versions": found_on,
        "settings": job["settings"],
        "seconds": round(time.time() - start, 1),
    }
    write_text(cell_path(job["folder"], job["key"]), json.dumps(cell), HINT)
    error_path(job["folder"], job["key"]).unlink(missing_ok=True)
    return cell


def fail(job: Mapping[str, Any], error: BaseException | str) -> None:
    """Record why a run has no cell."""
    text = error if isinstance(error, str) else "".join(traceback.format_exception(error))
    write_text(error_path(job["folder"], job["key"]), text.rstrip() + "\n", HINT)


def _checkpoint(job: Mapping[str, Any]) -> str:
    """Train, or go on; the path of the finished run's checkpoint."""
    if job["processes"] == 1:
        return train(job["config"], job["config_hash"], job["device"])["checkpoint"]
    yaml = Path(job["folder"]) / "configs" / f"{job['key']}.yaml"
    return train_under_torchrun(job["config"], job["config_hash"], job["processes"], yaml)


def of_metrics(cfg: Config, metrics: Sequence[dict], processes: int = 1) -> tuple[dict, dict]:
    """(cost, curve) of the rows of metrics.jsonl: median ms per optimiser step, peak MB, steps, minutes and FLOP of
    training (metrics/flops.py has what counts; None for rows of before it was recorded).
    """
    if not metrics:
        raise UserError(f"{cfg.folder}: metrics.jsonl is missing or empty; remove the folder to train again")
    clips = cfg.data.batch_size * cfg.optimization.accumulate * processes  # of one optimiser step
    before, step_ms, minutes, flops = 0, [], 0.0, 0.0
    for row in metrics:
        step_ms.append(1000 * clips / row["clips_per_s"])
        minutes += (row["step"] - before) * step_ms[-1] / 60_000
        if flops is not None:
            of_step = row.get("step_flops")
            flops = None if of_step is None else flops + (row["step"] - before) * of_step
        before = row["step"]
    peaks = [row["peak_memory_mb"] for row in metrics if row.get("peak_memory_mb") is not None]
    cost = {
        "step_ms": round(statistics.median(step_ms), 3),
        "peak_mb": max(peaks, default=None),
        "steps": metrics[-1]["step"],
        "minutes": round(minutes, 3),
        "flops": flops,
    }
    kept = metrics[:: -(-len(metrics) // POINTS)]
    return cost, {"step": [m["step"] for m in kept], "loss": [round(m["loss"], 6) for m in kept]}
