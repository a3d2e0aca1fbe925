"""The laptop demo: render, pretrain four encoders, probe them frozen beside their controls, write the report."""

from __future__ import annotations

import json
import os
import platform
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

from vjepa_fast.errors import UserError
from vjepa_fast.evaluation.run.rows import Row, against
from vjepa_fast.study.demo import records, tasks
from vjepa_fast.study.demo.plan import SUITE_TEXT, DemoPlan, run_config, settings_text
from vjepa_fast.study.demo.report import write_report
from vjepa_fast.study.jobs.pool import Task, run_tasks, workers_and_threads

PARTS = {"fewshot": ["train", "test"]}  # what the evaluation reads of a suite, if not train, val and test


class Demo:
    """The task graph of a plan in a folder: ``suites/ cache/ runs/ tasks/ logs/``, ``results.json report.html``."""

    def __init__(self, folder: str | os.PathLike, plan: DemoPlan, workers: int | None = None):
        self.folder, self.plan = Path(folder), plan
        found, self.threads = workers_and_threads(plan.device)
        self.workers = workers or found
        self.evaluated = [*plan.probed, *(["fewshot"] if "fewshot" in plan.suites else [])]
        self.manifests = {
            name: {split: str(self.folder / "suites" / name / f"{split}.csv") for split, n in splits.items() if n}
            for name, splits in plan.suites.items()
        }
        self.configs = {
            run.key: run_config(plan, run, self.manifests, str(self.folder / "runs" / run.key), self.threads)
            for run in plan.runs
        }
        data = self.config.data
        self.view = {
            "num_frames": max(data.dataset_fpcs),
            "crop_size": data.crop_size,
            "frame_step": data.frame_sample_rate or 1,
        }

    @property
    def config(self):
        """The first run's: all share one architecture, which the controls take too."""
        return next(iter(self.configs.values()))

    def plain(self, key: str) -> dict:
        from vjepa_fast import config

        return config.to_dict(self.configs[key])

    def tasks(self) -> list[Task]:
        plan, first = self.plan, plan_values(self.plan)
        render_values = {"size": plan.size, "frames": plan.frames, "fps": plan.fps, "seed": plan.seed}
        out = []
        for rank, (name, splits) in enumerate(plan.suites.items()):
            identity = [name, splits, render_values, suite_values(name)]
            values = {
                "name": name,
                "folder": str(self.folder / "suites" / name),
                "splits": splits,
                "key": json.dumps(identity, sort_keys=True),
                **render_values,
            }
            out.append(
                Task(
                    f"render-{name}",
                    tasks.render,
                    lambda r, v=values: v,
                    rank=rank,
                    identity=identity,
                    check=_all_exist,
                )
            )
        for name in self.evaluated:
            out.append(
                Task(
                    f"decode-{name}",
                    tasks.decode,
                    lambda r, n=name: {
                        "manifests": self.manifests[n],
                        "parts": PARTS.get(n, ["train", "val", "test"]),
                        "view": self.view,
                        "path": self._clips(n),
                    },
                    needs=(f"render-{name}",),
                    rank=15,
                    identity=[name, self.view],
                    check=os.path.exists,
                )
            )
        needs = tuple(f"decode-{name}" for name in self.evaluated)
        clips = {name: self._clips(name) for name in self.evaluated}
        for rank, run in enumerate(plan.runs):
            value = self.plain(run.key)
            identity = {k: v for k, v in value.items() if k not in ("folder", "runtime", "data")}
            identity["data"] = {k: v for k, v in value["data"].items() if k != "datasets"}
            identity["clips"] = {n: [plan.suites[n]["train"], suite_values(n)] for n in run.weights}
            out.append(
                Task(
                    f"train-{run.key}",
                    tasks.train,
                    lambda r, v=value, i=identity: {
                        "config": v,
                        "key": json.dumps([i, render_values], sort_keys=True, default=str),
                        "device": plan.device,
                    },
                    needs=tuple(f"render-{n}" for n in run.weights),
                    rank=10 + rank,
                    identity=identity,
                    check=lambda result: os.path.exists(result["checkpoint"]),
                )
            )
            out.append(
                Task(
                    f"evaluate-{run.key}",
                    tasks.evaluate,
                    lambda r, k=run.key, label=run.name: {
                        "label": label,
                        "checkpoint": r[f"train-{k}"]["checkpoint"],
                        "clips": clips,
                        "plan": first,
                        "cache_dir": str(self.folder / "runs" / k / "features"),
                    },
                    needs=(f"train-{run.key}", *needs),
                    rank=20,
                    identity=[run.name, first],
                )
            )
        value = self.plain(plan.runs[0].key)
        shape = {k: value[k] for k in ("model", "seed")}
        out.append(
            Task(
                "controls",
                tasks.controls,
                lambda r: {"config": value, "clips": clips, "plan": first},
                needs=needs,
                rank=25,
                identity=[shape, first],
            )
        )
        for name in self.evaluated:
            out.append(
                Task(
                    f"supervised-{name}",
                    tasks.supervised,
                    lambda r, n=name: {"config": value, "suite": n, "clips": clips[n], "plan": first},
                    needs=(f"decode-{name}",),
                    rank=22,
                    identity=[shape, name, first],
                )
            )
        out.append(
            Task(
                "pictures",
                tasks.pictures,
                lambda r: {
                    "configs_by_run": {run.name: self.plain(run.key) for run in plan.runs},
                    "checkpoints": {run.name: r[f"train-{run.key}"]["checkpoint"] for run in plan.runs},
                    "clips": clips,
                    "names": [n for n in plan.probed if n != "objects"][:2],
                    "seed": plan.seed,
                    "path": str(self.folder / "pictures.npz"),
                },
                needs=(*(f"train-{run.key}" for run in plan.runs), *needs),
                rank=21,
                identity=[plan.seed],
                check=os.path.exists,
            )
        )
        return out

    def _clips(self, name: str) -> str:
        return str(self.folder / "cache" / f"{name}.safetensors")

    # ------------------------------------------------------------ results

    def rows(self, results: dict) -> list[Row]:
        """All rows, controls first, each pretrained one set against random init."""
        names = [
            "controls",
            *(f"supervised-{n}" for n in self.evaluated),
            *(f"evaluate-{run.key}" for run in self.plan.runs),
        ]
        rows = [Row(**{**r, "hits": tuple(r["hits"])}) for name in names for r in results[name]]
        order = {name: i for i, name in enumerate(self.evaluated)}
        rows.sort(key=lambda r: order[r.suite])  # stable: the order of encoders stays
        return against(rows, [r for r in rows if r.kind == "random"], seed=self.plan.seed)

    def suites(self, rows: list[Row]) -> list[records.SuiteRecord]:
        out = []
        for name in self.evaluated:
            sizes = self.plan.suites[name]
            chance = next(r.chance for r in rows if r.suite == name)
            classes = len(json.loads((self.folder / "suites" / name / "classes.json").read_text()))
            out.append(
                records.SuiteRecord(
                    name, SUITE_TEXT[name], sizes.get("train", 0), sizes.get("val", 0), sizes["test"], classes, chance
                )
            )
        return out

    def write(self, results: dict, seconds: float) -> Path:
        """``results.json`` and ``report.html``."""
        import numpy as np

        rows = self.rows(results)
        runs = [
            records.RunRecord(
                run.name,
                run.objective,
                run.regime,
                records.read_metrics(self.folder / "runs" / run.key),
                settings_text(self.configs[run.key], run.weights),
            )
            for run in self.plan.runs
        ]
        masks, pcas = [], []
        with np.load(results["pictures"]) as arrays:
            for name in dict.fromkeys(k.split("/")[0] for k in arrays.files):
                frames = arrays[f"{name}/frames"]
                masks.append(
                    records.MaskPicture(
                        f"A test clip of {name}",
                        frames,
                        *(arrays[f"{name}/{k}"] for k in ("plain", "guided", "saliency")),
                    )
                )
                pcas.append(
                    records.PcaPicture(
                        f"A test clip of {name}",
                        frames,
                        {k.split("/", 2)[2]: arrays[k] for k in arrays.files if k.startswith(f"{name}/pca/")},
                    )
                )
        environment = _environment(self.workers, self.threads, self.plan.device, seconds)
        content = {
            "format": 1,
            "plan": asdict(self.plan),
            "environment": environment,
            "rows": [r.to_dict() for r in rows],
        }
        temporary = self.folder / "results.json.tmp"
        temporary.write_text(json.dumps(content, indent=1))
        temporary.replace(self.folder / "results.json")
        return write_report(
            self.folder / "report.html",
            title="Video-JEPA on a laptop",
            runs=runs,
            rows=rows,
            suites=self.suites(rows),
            mask_pictures=masks,
            pca_pictures=pcas,
            committed=records.load_committed(),
            environment=environment,
            protocol=_protocol(self.plan, self.view),
        )


def plan_values(plan: DemoPlan) -> dict:
    """What the evaluation tasks need of the plan."""
    return {
        k: getattr(plan, k)
        for k in ("pooling", "supervised_steps", "supervised_batch", "episodes", "queries", "seed", "device")
    }


def suite_values(name: str) -> dict:
    """What a suite looks like in this version of the package: its parameters and the format of its rendering."""
    from vjepa_fast.data.synthetic import SUITES
    from vjepa_fast.data.synthetic.write import FORMAT

    return {"format": FORMAT, **asdict(SUITES[name])}


def _all_exist(manifests: dict) -> bool:
    return all(os.path.exists(path) for path in manifests.values())


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


def _protocol(plan: DemoPlan, view: dict) -> list[str]:
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


def run_demo(
    folder: str | os.PathLike = "runs/demo",
    plan: DemoPlan | None = None,
    *,
    workers: int | None = None,
    on_event: Callable[[str, str], None] = lambda kind, name: None,
    on_tick: Callable[[set], None] = lambda running: None,
) -> tuple[list[Row], Path]:
    """Run what is missing of the demo in ``folder`` and write its report: (rows, path of the report).

    A stopped demo goes on where it stopped; one with another plan does its changed parts again. Raises UserError
    where the folder cannot be written, and whatever a task raises.
    """
    start = time.time()
    demo = Demo(folder, plan or DemoPlan(), workers)
    try:
        demo.folder.mkdir(parents=True, exist_ok=True)
        probe = demo.folder / ".writable"
        probe.write_text("")
        probe.unlink()
    except OSError as error:
        raise UserError(f"{folder}: cannot be written ({error.strerror}); choose another with --folder") from None
    results = run_tasks(
        demo.tasks(), demo.folder, workers=demo.workers, threads=demo.threads, on_event=on_event, on_tick=on_tick
    )
    rows, report = demo.rows(results), demo.write(results, time.time() - start)
    return rows, report
