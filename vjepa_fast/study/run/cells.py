"""One run of the study from its configuration to its cell: train (or go on), evaluate the frozen encoder, write JSON.

A job is a plain dict, so that it can be sent to another process or machine:
    {"key", "variant", "regime", "compat", "seed", "kind": "pretrained" | "random", "config": dict, "config_hash",
     "folder": of the study, "sources": suites.*.sources(), "evaluation": suites.*.evaluation(), "device",
     "settings": {text: text}, "side_by_side": runs on the machine at once, "processes": per run (torchrun if > 1)}
"""

from __future__ import annotations

import hashlib
import json
import os
import statistics
import subprocess
import sys
import time
import traceback
from functools import partial
from pathlib import Path

from vjepa_fast.errors import TrainingError, UserError
from vjepa_fast.study.demo import tasks
from vjepa_fast.study.demo.records import read_metrics

FORMAT = 1
POINTS = 200  # of a learning curve


def cell_path(folder, key: str) -> Path:
    return Path(folder) / "cells" / f"{key}.json"


def error_path(folder, key: str) -> Path:
    return Path(folder) / "cells" / f"{key}.error.txt"


def config_hash(config: dict, processes: int = 1) -> str:
    """sha256 over what decides the outcome of a run: the configuration without paths, device and threads, and the
    number of processes, each of which adds a batch to a step.
    """
    value = {k: v for k, v in config.items() if k not in ("folder", "runtime")}
    value["data"] = {k: v for k, v in config["data"].items() if k not in ("datasets", "num_workers", "pin_mem")}
    value["dtype"] = config["runtime"]["dtype"]
    if processes > 1:
        value["processes"] = processes
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def control_hash(config: dict) -> str:
    """The same of a random-init control, whose weights and clips do not depend on how anything is trained."""
    data = {k: config["data"][k] for k in ("crop_size", "patch_size", "tubelet_size", "dataset_fpcs")}
    data["dataset_fpcs"] = max(data["dataset_fpcs"])
    value = {"model": config["model"], "seed": config["seed"], "data": data}
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def read_cell(folder, key: str) -> dict | None:
    """The finished cell of that key; None where there is none or the file is damaged."""
    try:
        found = json.loads(cell_path(folder, key).read_text())
        return found if found["format"] == FORMAT and found["rows"] else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def write_text(path: Path, text: str) -> None:
    """Under a temporary name, then renamed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_text(text)
        temporary.replace(path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise UserError(f"{path}: cannot be written ({error.strerror}); free space and run the study again") from None


def run(job: dict) -> dict:
    """Train, evaluate and write the cell of ``job``; returns it. Raises what training and evaluation raise."""
    from vjepa_fast import config as configs

    start, cfg = time.time(), configs.from_dict(job["config"])
    cost, curve, students = {"step_ms": None, "peak_mb": None, "steps": 0, "minutes": 0.0}, {"step": [], "loss": []}, []
    if job["kind"] == "random":
        from vjepa_fast.evaluation import random_encoder

        encoder = random_encoder(cfg).to(job["device"])
        rows, geometry = evaluate(job, encoder)
        versions = _versions(cfg, job["device"])
    else:
        from vjepa_fast.models import load_encoder

        checkpoint = _train(job)
        rows, geometry = evaluate(job, load_encoder(checkpoint, which="target_encoder", device=job["device"]))
        if cfg.compat == "published" and cfg.target.mode == "online":
            # the published code evaluates a target left at its random start: show what was trained beside it
            student = load_encoder(checkpoint, which="encoder", device=job["device"])
            students, found = evaluate(job, student, "encoder")
            geometry += found
        cost, curve = of_metrics(cfg, read_metrics(cfg.folder), job["processes"])
        versions = json.loads((Path(cfg.folder) / "versions.json").read_text())
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
        "versions": versions,
        "settings": job["settings"],
        "seconds": round(time.time() - start, 1),
    }
    write_text(cell_path(job["folder"], job["key"]), json.dumps(cell))
    error_path(job["folder"], job["key"]).unlink(missing_ok=True)
    return cell


def fail(job: dict, error: BaseException | str) -> None:
    """Record why a run has no cell."""
    text = error if isinstance(error, str) else "".join(traceback.format_exception(error))
    write_text(error_path(job["folder"], job["key"]), text.rstrip() + "\n")


def _train(job: dict) -> str:
    """The path of the finished run's checkpoint."""
    if job["processes"] == 1:
        return tasks.train(job["config"], job["config_hash"], job["device"])["checkpoint"]
    from vjepa_fast import config as configs
    from vjepa_fast.models.interop import newest_checkpoint

    cfg = configs.from_dict(job["config"])
    mark = Path(cfg.folder) / "study_hash.txt"
    same = mark.is_file() and mark.read_text() == job["config_hash"]
    path = Path(job["folder"]) / "configs" / f"{job['key']}.yaml"
    write_text(path, configs.dump_yaml(cfg))
    command = torchrun_command(path, job["processes"], resume=same or not (Path(cfg.folder) / "checkpoints").exists())
    write_text(mark, job["config_hash"])
    process = subprocess.Popen(command)
    try:
        code = process.wait()
    except BaseException:  # a stop: its trainers save and leave first
        process.terminate()
        process.wait()
        raise
    if code:
        raise TrainingError(f"{' '.join(command)}: exit code {code}; what it said is in the run's log")
    return str(newest_checkpoint(cfg.folder))


def torchrun_command(config: str | os.PathLike, processes: int, *, resume: bool = True) -> list[str]:
    """The command that trains one run on ``processes`` GPUs of this machine."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    return [*launcher, "-m", "vjepa_fast", "train", str(config), *([] if resume else ["--no-resume"])]


def evaluate(job: dict, encoder, which: str = "target_encoder") -> tuple[list, list[dict]]:
    """(accuracy rows, geometry rows) of a frozen encoder on every source of the study."""
    from vjepa_fast.evaluation import episode_rows, extract_features, probe_rows
    from vjepa_fast.evaluation.fewshot import centred

    how, rows = job["evaluation"], []
    label = job["variant"].replace("_", " ") if job["kind"] == "random" else f"{job['variant']} {job['regime']}"
    label += " (published)" if job["compat"] == "published" else ""
    label += ", student" if which == "encoder" else ""
    geometry = None
    for suite, source in job["sources"].items():
        in_memory = "clips" in source
        parts = tasks.load_clips(source["clips"], suite) if in_memory else _manifests(source["manifests"])
        cache = None if in_memory else str(Path(job["folder"]) / "runs" / job["key"] / "features")
        features_of = partial(
            extract_features,
            encoder,
            pooling=how["pooling"],
            batch_size=32,
            device=job["device"],
            cache_dir=cache,
            workers=0 if in_memory else min(4, os.cpu_count() or 1),
            **how["view"],
        )
        found = {part: features_of(clips) for part, clips in parts.items()}
        if geometry is None:  # of the first suite's test clips
            geometry = _geometry(job, encoder, which, parts["test"])
        if source["kind"] == "fewshot":
            novel = centred(found["test"], found["train"]) if "train" in found else found["test"]
            many = {k: how[k] for k in ("way", "queries", "episodes", "seed")}
            rows += episode_rows(label, job["kind"], suite, novel, **many)
        else:
            rows += probe_rows(
                label, job["kind"], suite, found["train"], found.get("val"), found["test"], seed=how["seed"]
            )
    return rows, geometry


def _geometry(job: dict, encoder, which: str, source) -> list[dict]:
    """Collapse figures of the encoder on at most so many clips of ``source`` (a ClipSet or a Manifest)."""
    import dataclasses

    import numpy as np

    from vjepa_fast.evaluation import ClipSet, decode_clips
    from vjepa_fast.evaluation.run.geometry import geometry_rows

    how = job["evaluation"]
    limit = how["geometry"]["max_clips"]
    if not isinstance(source, ClipSet):
        chosen = np.sort(np.random.default_rng(how["seed"]).permutation(len(source))[:limit])
        few = dataclasses.replace(source, paths=[source.paths[i] for i in chosen], labels=source.labels[chosen])
        source = decode_clips(few, **how["view"])
    return geometry_rows(
        encoder, source, label=which, seed=how["seed"], batch_size=32, device=job["device"], **how["geometry"]
    )


def _manifests(paths: dict[str, str]) -> dict:
    from vjepa_fast import data

    return {part: data.load_manifest(path) for part, path in paths.items()}


def of_metrics(cfg, metrics: list[dict], processes: int = 1) -> tuple[dict, dict]:
    """(cost, curve) of the rows of metrics.jsonl: median ms per optimiser step, peak MB, steps, minutes of training."""
    if not metrics:
        raise UserError(f"{cfg.folder}: metrics.jsonl is missing or empty; remove the folder to train again")
    clips = cfg.data.batch_size * cfg.optimization.accumulate * processes  # of one optimiser step
    before, step_ms, minutes = 0, [], 0.0
    for row in metrics:
        step_ms.append(1000 * clips / row["clips_per_s"])
        minutes += (row["step"] - before) * step_ms[-1] / 60_000
        before = row["step"]
    peaks = [row["peak_memory_mb"] for row in metrics if row.get("peak_memory_mb") is not None]
    cost = {
        "step_ms": round(statistics.median(step_ms), 3),
        "peak_mb": max(peaks, default=None),
        "steps": metrics[-1]["step"],
        "minutes": round(minutes, 3),
    }
    kept = metrics[:: -(-len(metrics) // POINTS)]
    return cost, {"step": [m["step"] for m in kept], "loss": [round(m["loss"], 6) for m in kept]}


def _versions(cfg, device: str) -> dict:
    import torch

    from vjepa_fast.trainer.run_folder import versions

    return versions(torch.device(device), torch.float32 if cfg.runtime.dtype == "float32" else torch.bfloat16)
