"""The study runner: which runs a study has, what is done of them, and running the rest.

``STUDY/study.json`` holds the plan, ``runs/<key>/`` the trainer's folders, ``cells/<key>.json`` the evaluated runs
(``<key>.error.txt`` where one failed), ``locks/`` and ``logs/`` what is at work. A key is
``<variant>-<regime>-<compat>-s<seed>``; the random-init control of a seed is ``random_init-none-intended-s<seed>``.
"""

from __future__ import annotations

import dataclasses
import json
import os
import platform
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path

from vjepa_fast.errors import ConfigError, UserError
from vjepa_fast.study.demo.plan import settings_text
from vjepa_fast.study.jobs import launch
from vjepa_fast.study.jobs.pool import run_tasks
from vjepa_fast.study.run import cells, variants
from vjepa_fast.study.run.suites import REGIMES, Settings, suite_of

FORMAT = 1
CONTROL = "random_init"


@dataclass(frozen=True)
class Grid:
    """Which runs are asked for. ``published``: variants that also (or only) run under ``compat: published``."""

    variants: tuple[str, ...]
    regimes: tuple[str, ...] = REGIMES
    seeds: tuple[int, ...] = (0,)
    intended: bool = True
    published: tuple[str, ...] = ()

    def runs(self) -> list[tuple[str, str, str, int]]:
        """(variant, regime, compat, seed) of every run, seed by seed, so that a study stopped early has whole seeds."""
        out = []
        for seed in self.seeds:
            out.append((CONTROL, "none", "intended", seed))
            for regime in self.regimes:
                for name in variants.VARIANTS:
                    if self.intended and name in self.variants:
                        out.append((name, regime, "intended", seed))
                    if name in self.published:
                        out.append((name, regime, "published", seed))
        return out


def key_of(variant: str, regime: str, compat: str, seed: int) -> str:
    return f"{variant}-{regime}-{compat}-s{seed}"


@dataclass
class Study:
    """A grid of runs with common settings in a folder."""

    folder: Path
    settings: Settings
    grid: Grid
    threads: int = 0
    side_by_side: int = 1
    processes: int = 1  # per run; more than one go through torchrun
    jobs: list[dict] = field(init=False)

    def __post_init__(self):
        self.folder = Path(self.folder)
        for regime in self.grid.regimes:
            if regime not in REGIMES:
                raise UserError(f"--regimes: {regime!r} is not known; give {', '.join(REGIMES)}")
        if not self.grid.regimes or not self.grid.seeds or not self.grid.runs():
            raise UserError("nothing to run: give at least one variant, regime and seed")
        self.suite = suite_of(self.settings, self.folder)
        self.suite.check(self.grid.regimes)
        self.jobs = [self._job(*run) for run in self.grid.runs()]

    def config(self, variant: str, regime: str, compat: str, seed: int):
        """The resolved Config of one run. Raises ConfigError where the combination has no meaning, saying why."""
        control = variant == CONTROL
        regime = self.grid.regimes[0] if control else regime
        cfg = self.suite.baseline(regime, compat, seed)
        cfg = cfg if control else variants.apply(variant, cfg)
        runtime = dataclasses.replace(
            cfg.runtime, device=self.settings.device, threads=self.threads, tensorboard=False, keep_checkpoints=1
        )
        folder = str(self.folder / "runs" / key_of(variant, regime, compat, seed))
        return dataclasses.replace(cfg, runtime=runtime, folder=folder)

    def _job(self, variant: str, regime: str, compat: str, seed: int) -> dict:
        from vjepa_fast import config as configs

        key = key_of(variant, regime, compat, seed)
        try:
            cfg = self.config(variant, regime, compat, seed)
            value = configs.to_dict(cfg)
            configs.from_dict(value, source=key)
        except ConfigError as error:
            raise ConfigError(f"{key}: {error}") from None
        control = variant == CONTROL
        weights = {} if control else self.suite.weights(regime)
        return {
            "key": key,
            "variant": variant,
            "regime": regime,
            "compat": compat,
            "seed": seed,
            "kind": "random" if control else "pretrained",
            "config": value,
            "config_hash": cells.control_hash(value) if control else cells.config_hash(value, self.processes),
            "folder": str(self.folder),
            "sources": self.suite.sources(),
            "evaluation": self.suite.evaluation(),
            "device": self.settings.device,
            "settings": settings_text(cfg, weights),
            "side_by_side": self.side_by_side,
            "processes": 1 if control else self.processes,
        }

    # ------------------------------------------------------------ what is there

    def claim(self) -> None:
        """Write ``study.json``, or add this grid to the one that is there.

        Raises UserError where the folder holds a study with other settings, or cells of other configurations.
        """
        fixed = json.loads(json.dumps(asdict(self.settings)))
        fixed["data"] = getattr(self.suite, "data", {})
        path = self.folder / "study.json"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            lock = launch.Lock(self.folder / "locks" / "study.lock", stale=30)
            while not lock.take():
                time.sleep(0.2)
        except OSError as error:
            raise UserError(f"{self.folder}: cannot be written ({error.strerror}); choose another folder") from None
        try:
            before = read_plan(self.folder) if path.exists() else {}
            if before:
                self._same(before["settings"], fixed)
            cells.write_text(path, json.dumps(self._content(before, fixed), indent=1))
        finally:
            lock.release()

    def _same(self, before: dict, now: dict) -> None:
        differs = [f"{k} ({before.get(k)} there, {now[k]} now)" for k in now if before.get(k) != now[k]]
        if differs:
            raise UserError(
                f"{self.folder}: holds a study with other settings: {'; '.join(differs)}; its runs cannot be compared "
                "with these, choose another folder"
            )

    def _content(self, before: dict, fixed: dict) -> dict:
        grid = self.grid
        modes = {"intended": grid.variants if grid.intended else (), "published": grid.published}
        asked = {
            "variants": [*dict.fromkeys([*grid.variants, *grid.published])],
            "regimes": list(grid.regimes),
            "seeds": list(grid.seeds),
            "keys": [job["key"] for job in self.jobs],
        }
        merged = {k: list(dict.fromkeys([*before.get(k, []), *v])) for k, v in asked.items()}
        merged["variants"] = [v for v in variants.VARIANTS if v in merged["variants"]]
        merged["seeds"] = sorted(merged["seeds"])
        old = before.get("modes", {})
        return {
            "format": FORMAT,
            "suite": self.settings.suite,
            **merged,
            "modes": {k: list(dict.fromkeys([*old.get(k, []), *v])) for k, v in modes.items()},
            "sizes": self.settings.sizes if self.settings.suite == "synthetic" else {},
            "settings": fixed,
            "evaluation": self.suite.evaluation(),
            "device": self.settings.device,
            **_versions(),
        }

    def missing(self) -> list[dict]:
        """Jobs without a cell. Raises UserError where a cell was made by another configuration."""
        out = []
        for job in self.jobs:
            cell = cells.read_cell(self.folder, job["key"])
            if cell is None:
                out.append(job)
            elif cell["config_hash"] != job["config_hash"]:
                raise UserError(
                    f"{cells.cell_path(self.folder, job['key'])}: was made with another configuration than this "
                    "version of the package makes; choose another folder, or remove the cell and its run"
                )
        return out

    def prepare(self, workers: int, threads: int, on_event: Callable[[str, str], None]) -> None:
        """Render and decode what is missing, in ``workers`` processes (0: in this one); one command at a time does so,
        others wait.
        """
        lock, told = launch.Lock(self.folder / "locks" / "prepare.lock"), False
        while not lock.take():
            if not told:
                on_event("elsewhere", "preparing data")
                told = True
            time.sleep(1.0)
        try:
            tasks = self.suite.tasks(self.grid.regimes)
            if workers:
                run_tasks(tasks, self.folder, workers=workers, threads=threads, on_event=on_event)
                return
            for task in tasks:  # in this process; rendering and decoding of what is there is quick
                task.function(**task.arguments({}))
        finally:
            lock.release()

    def failed(self) -> list[str]:
        """Keys of this grid that have an error file and no cell."""
        keys = [j["key"] for j in self.jobs]
        return [k for k in keys if cells.error_path(self.folder, k).is_file() and not cells.read_cell(self.folder, k)]


def read_plan(folder) -> dict:
    """``study.json`` of a study folder. Raises UserError where there is none, or it is no plan of this format."""
    path = Path(folder) / "study.json"
    try:
        found = json.loads(path.read_text())
        if found["format"] != FORMAT or not isinstance(found["settings"], dict):
            raise KeyError("format")
        return found
    except FileNotFoundError:
        raise UserError(f"{path}: no such study; vjepa-fast study run makes one") from None
    except (OSError, ValueError, KeyError, TypeError):
        raise UserError(f"{path}: is not a study plan of format {FORMAT}; remove it or choose another folder") from None


def _versions() -> dict:
    import torch

    from vjepa_fast import __version__
    from vjepa_fast.trainer.run_folder import git_commit

    found = {"package": __version__, "torch": str(torch.__version__), "python": platform.python_version()}
    return {"versions": found, "commit": git_commit()}


def run_study(
    study: Study,
    *,
    launcher: str = "processes",
    places: list[str | None] = (None,),
    slurm: dict | None = None,
    at_once: int | None = None,
    on_event: Callable[[str, dict | str], None] = lambda what, job: None,
) -> list[str]:
    """Run what is missing of ``study``; keys of the runs that failed (the others went on).

    ``launcher``: ``processes`` (``places``: per slot a GPU or None), ``slurm``, or ``inline`` (in this process, one
    after the other). ``on_event(what, job or text)``: prepare, start, done, failed, kept, elsewhere.
    """
    study.claim()
    jobs = study.missing()
    keys = {j["key"] for j in jobs}
    for job in study.jobs:
        if job["key"] not in keys:
            on_event("kept", job)
    if not jobs:
        return study.failed()
    with launch.terminable():
        cores = os.cpu_count() or 1
        workers = 0 if launcher == "inline" else cores if study.settings.device != "cpu" else min(cores, len(places))
        study.prepare(
            workers,
            1,
            lambda what, name: on_event("elsewhere" if what == "elsewhere" else "prepare", f"{name}: {what}"),
        )
        if launcher == "slurm":
            launch.run_slurm(jobs, study.folder, slurm or {}, at_once, on_event)
        elif launcher == "inline":
            for job in jobs:
                on_event("start", job)
                on_event(launch.locked(job), job)
        else:
            launch.run_processes(jobs, list(places), study.threads, on_event)
    return study.failed()
