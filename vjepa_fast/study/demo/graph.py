"""The laptop demo: render, pretrain four encoders, probe them frozen beside their controls, write the report."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from vjepa_fast.config import Config
from vjepa_fast.data.synthetic import suite_values
from vjepa_fast.errors import UserError
from vjepa_fast.evaluation import Row
from vjepa_fast.study.demo import page, tasks
from vjepa_fast.study.demo.plan import DemoPlan, DemoRun, run_config
from vjepa_fast.study.jobs.pool import Task, run_tasks
from vjepa_fast.study.jobs.workers import cores
from vjepa_fast.study.run.clips import cached, decode_task, manifests, render_task, view_of
from vjepa_fast.study.run.training import train


class Demo:
    """The task graph of a plan in a folder: ``suites/ cache/ runs/ tasks/ logs/``, ``results.json report.html``.

    ``evaluated`` are the suites that encoders are evaluated on, ``view`` the clip, ``configs`` the runs' by key.
    """

    def __init__(self, folder: str | os.PathLike, plan: DemoPlan, workers: int | None = None):
        self.folder, self.plan = Path(folder), plan
        at_once = min(4, cores()) if plan.device == "cpu" else 1
        self.workers, self.threads = workers or at_once, max(1, cores() // at_once)
        self.evaluated = [*plan.probed, *(["fewshot"] if "fewshot" in plan.suites else [])]
        paths = {name: manifests(self.folder, name, sizes) for name, sizes in plan.suites.items()}
        self.configs: dict[str, Config] = {
            run.key: run_config(plan, run, paths, str(self.folder / "runs" / run.key), self.threads)
            for run in plan.runs
        }
        self.view = view_of(next(iter(self.configs.values())).data)  # all share it, as they do the architecture

    def plain(self, key: str) -> dict[str, Any]:
        """The configuration of a run as a dict."""
        from vjepa_fast import config

        return config.to_dict(self.configs[key])

    def tasks(self) -> list[Task]:
        """Everything there is to do; lower ranks first, so that the long runs begin early."""
        plan = self.plan
        values = {k: getattr(plan, k) for k in tasks.PLAN}
        video = {"size": plan.size, "frames": plan.frames, "fps": plan.fps, "seed": plan.seed}
        decoded = tuple(f"decode-{name}" for name in self.evaluated)
        clips = {name: cached(self.folder, name) for name in self.evaluated}
        first = self.plain(plan.runs[0].key)
        shape = {k: first[k] for k in ("model", "seed")}
        trained = {run.name: f"train-{run.key}" for run in plan.runs}
        out = [
            *(render_task(self.folder, n, sizes, video, rank) for rank, (n, sizes) in enumerate(plan.suites.items())),
            *(decode_task(self.folder, name, plan.suites[name], self.view, 15) for name in self.evaluated),
        ]
        for rank, run in enumerate(plan.runs):
            evaluated = {"label": run.name, "clips": clips, "plan": values}
            evaluated["cache_dir"] = str(self.folder / "runs" / run.key / "features")
            evaluate = Task(
                f"evaluate-{run.key}",
                tasks.evaluate,
                lambda r, train=trained[run.name], more=evaluated: {"checkpoint": r[train]["checkpoint"], **more},
                needs=(trained[run.name], *decoded),
                rank=20,
                identity=[run.name, values],
            )
            out += [self._train(run, video, 10 + rank), evaluate]
        common = {"config": first, "plan": values}
        controls = {**common, "clips": clips}
        out.append(Task("controls", tasks.controls, controls, needs=decoded, rank=25, identity=[shape, values]))
        for name, needed in zip(self.evaluated, decoded):
            more = {**common, "suite": name, "clips": clips[name]}
            identity = [shape, name, values]
            out.append(Task(f"supervised-{name}", tasks.supervised, more, (needed,), rank=22, identity=identity))
        drawn = {
            "config": first,
            "clips": {n: clips[n] for n in [n for n in plan.probed if n != "objects"][:2]},
            "seed": plan.seed,
            "path": str(self.folder / "pictures.npz"),
        }
        pictures = Task(
            "pictures",
            tasks.pictures,
            lambda r: {"checkpoints": {name: r[task]["checkpoint"] for name, task in trained.items()}, **drawn},
            needs=(*trained.values(), *decoded),
            rank=21,
            identity=[plan.seed],
            check=os.path.exists,
        )
        return [*out, pictures]

    def _train(self, run: DemoRun, video: dict[str, int], rank: int) -> Task:
        value = self.plain(run.key)
        identity = {k: v for k, v in value.items() if k not in ("folder", "runtime", "data")}
        identity["data"] = {k: v for k, v in value["data"].items() if k != "datasets"}
        identity["clips"] = {n: [self.plan.suites[n]["train"], suite_values(n)] for n in run.weights}
        key = json.dumps([identity, video], sort_keys=True, default=str)
        return Task(
            f"train-{run.key}",
            train,
            {"config": value, "key": key, "device": self.plan.device},
            needs=tuple(f"render-{n}" for n in run.weights),
            rank=rank,
            identity=identity,
            check=lambda result: os.path.exists(result["checkpoint"]),
        )


def run_demo(
    folder: str | os.PathLike = "runs/demo",
    plan: DemoPlan | None = None,
    *,
    workers: int | None = None,
    on_event: Callable[[str, str], None] = lambda kind, name: None,
    on_tick: Callable[[set], None] = lambda running: None,
) -> tuple[list[Row], Path]:
    """Run what is missing of the demo in ``folder`` and write its report: (rows, path of the report).

    A stopped demo goes on where it stopped; one with another plan does its changed parts again. Raises UserError where
    the folder cannot be written, and what a task raises.
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
    found = run_tasks(
        demo.tasks(), demo.folder, at_once=demo.workers, threads=demo.threads, on_event=on_event, on_tick=on_tick
    )
    rows = page.rows_of(demo, found)
    return rows, page.write(demo, found, rows, time.time() - start)
