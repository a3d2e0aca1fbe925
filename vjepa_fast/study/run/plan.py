"""Which runs a study has, what is done of them, and ``study.json``, which records them.

A study's folder also has ``runs/<key>/``, the trainer's folders, ``cells/<key>.json``, the evaluated runs
(``<key>.error.txt`` where one failed), and ``locks/`` and ``logs/`` of what is at work. The key of a run is
``<variant>-<regime>-<compat>-s<seed>``; the random-init control of a seed is ``random_init-none-intended-s<seed>``.
"""

from __future__ import annotations

import dataclasses
import json
import os
import platform
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import product
from pathlib import Path
from typing import Any

from vjepa_fast.errors import ConfigError, UserError
from vjepa_fast.files import parse_json, write_json
from vjepa_fast.locks import Lock
from vjepa_fast.study.records import FORMAT, RANDOM, cell_key
from vjepa_fast.study.run import cells, variants
from vjepa_fast.study.run.suites import REGIMES, Settings, Synthetic, suite_of
from vjepa_fast.study.run.training import settings_text


@dataclass(frozen=True)
class Grid:
    """Which runs are asked for. ``published``: variants that also (or only) run under ``compat: published``."""

    variants: tuple[str, ...]
    regimes: tuple[str, ...] = REGIMES
    seeds: tuple[int, ...] = (0,)
    intended: bool = True
    published: tuple[str, ...] = ()

    @property
    def modes(self) -> dict[str, tuple[str, ...]]:
        """The variants of each mode."""
        return {"intended": self.variants if self.intended else (), "published": self.published}

    def runs(self) -> list[tuple[str, str, str, int]]:
        """(variant, regime, compat, seed) of every run, seed by seed, so that a study stopped early has whole seeds."""
        out = []
        for seed in self.seeds:
            out.append((RANDOM, "none", "intended", seed))
            for regime, name in product(self.regimes, variants.VARIANTS):
                out += [(name, regime, compat, seed) for compat, asked in self.modes.items() if name in asked]
        return out


@dataclass
class StudyPlan:
    """A grid of runs with common settings in a folder; ``jobs`` has one per run, as ``run.cells`` describes them."""

    folder: Path
    settings: Settings
    grid: Grid
    threads: int = 0  # CPU threads of each run (0: torch's choice)
    side_by_side: int = 1  # runs that share the machine; noted in their cells
    processes: int = 1  # of each run; more than one are started by torchrun
    force: bool = False  # run even where a suite has failed its instrument check, or has none
    jobs: list[dict] = field(init=False)

    def __post_init__(self) -> None:
        self.folder = Path(self.folder)
        for regime in self.grid.regimes:
            if regime not in REGIMES:
                raise UserError(f"--regimes: {regime!r} is not known; give {', '.join(REGIMES)}")
        if not self.grid.regimes or not self.grid.seeds or not self.grid.runs():
            raise UserError("nothing to run: give at least one variant, regime and seed")
        self.suite = suite_of(self.settings, self.folder)
        self.suite.check(self.grid.regimes)
        self.jobs = [self._job(*run) for run in self.grid.runs()]

    def _job(self, variant: str, regime: str, compat: str, seed: int) -> dict:
        """One run as a job. Raises ConfigError where the combination has no meaning, saying why."""
        from vjepa_fast import config as configs

        key, control = cell_key(variant, regime, compat, seed), variant == RANDOM
        more = {"device": self.settings.device, "threads": self.threads, "tensorboard": False, "keep_checkpoints": 1}
        try:
            like = self.grid.regimes[0] if control else regime
            cfg = self.suite.baseline(like, compat, seed)
            cfg = cfg if control else variants.apply(variant, cfg)
            folder = str(self.folder / "runs" / cell_key(variant, like, compat, seed))
            cfg = dataclasses.replace(cfg, folder=folder, runtime=dataclasses.replace(cfg.runtime, **more))
            value = configs.to_dict(cfg)
            configs.from_dict(value, source=key)
        except ConfigError as error:
            raise ConfigError(f"{key}: {error}") from None
        identity = {"key": key, "variant": variant, "regime": regime, "compat": compat, "seed": seed}
        return {
            **identity,
            "kind": "random" if control else "pretrained",
            "config": value,
            "config_hash": cells.control_hash(value) if control else cells.config_hash(value, self.processes),
            "folder": str(self.folder),
            "sources": self.suite.sources(),
            "evaluation": self.suite.evaluation(),
            "device": self.settings.device,
            "settings": settings_text(cfg, {} if control else self.suite.weights(regime)),
            "side_by_side": self.side_by_side,
            "processes": 1 if control else self.processes,
        }

    def check_instrument(self, say: Callable[[str], None]) -> list[str]:
        """Check the instrument where that has not been done; the suites that are used although they did not pass.

        Raises UserError where a suite fails and the study is not forced.
        """
        from vjepa_fast.study.instrument.gate import gate

        if not isinstance(self.suite, Synthetic):
            return []
        return gate(self.folder, self.suite.names, self.suite.setting(), self.force, say)

    def claim(self, forced: Sequence[str] = ()) -> None:
        """Write ``study.json``, or add this grid to the one that is there. ``forced``: suites that are used although
        their instrument check did not pass.

        Raises UserError where the folder holds a study with other settings, or cells of other configurations.
        """
        now = {**json.loads(json.dumps(asdict(self.settings))), "data": self.suite.data}
        path = self.folder / "study.json"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            lock = Lock(self.folder / "locks" / "study.lock", stale=30)
            while not lock.take():
                time.sleep(0.2)
        except OSError as error:
            raise UserError(f"{self.folder}: cannot be written ({error.strerror}); choose another folder") from None
        try:
            before = read_plan(self.folder) if path.exists() else {}
            defaults = {"tune": {}, "recipe": Settings.recipe}  # of settings that older plans do not have
            there = {**defaults, **before.get("settings", now)}
            differs = [f"{k} ({there.get(k)} there, {v} now)" for k, v in now.items() if there.get(k) != v]
            if differs:
                raise UserError(
                    f"{self.folder}: holds a study with other settings: {'; '.join(differs)}; its runs cannot be "
                    "compared with these, choose another folder"
                )
            write_json(path, self._content(before, now, forced), cells.HINT)
        finally:
            lock.release()

    def _content(self, before: Mapping[str, Any], settings: Mapping[str, Any], forced: Sequence[str]) -> dict:
        import torch

        from vjepa_fast import __version__
        from vjepa_fast.trainer.run_folder import git_commit

        def merged(old: Sequence, new: Iterable) -> list:
            return list(dict.fromkeys([*old, *new]))

        grid, modes = self.grid, before.get("modes", {})
        chosen = merged(before.get("variants", []), (*grid.variants, *grid.published))
        return {
            "format": FORMAT,
            "suite": self.settings.suite,
            "variants": [v for v in variants.VARIANTS if v in chosen],
            "regimes": merged(before.get("regimes", []), grid.regimes),
            "seeds": sorted(merged(before.get("seeds", []), grid.seeds)),
            "keys": merged(before.get("keys", []), (job["key"] for job in self.jobs)),
            "modes": {mode: merged(modes.get(mode, []), asked) for mode, asked in grid.modes.items()},
            "sizes": self.settings.sizes if self.settings.suite == "synthetic" else {},
            "settings": settings,
            "evaluation": self.suite.evaluation(),
            "instrument": {"forced": sorted(merged(before.get("instrument", {}).get("forced", []), forced))},
            "device": self.settings.device,
            "versions": {"package": __version__, "torch": str(torch.__version__), "python": platform.python_version()},
            "commit": git_commit(),
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

    def failed(self) -> list[str]:
        """Keys of this grid that have an error file and no cell."""
        keys = [j["key"] for j in self.jobs if not cells.done(j)]
        return [key for key in keys if cells.error_path(self.folder, key).is_file()]


def read_plan(folder: str | os.PathLike) -> dict:
    """``study.json`` of a study folder. Raises UserError where there is none, or it is no plan of this format."""
    path = Path(folder) / "study.json"
    try:
        found = parse_json(path.read_text())
        if found["format"] != FORMAT or not isinstance(found["settings"], dict):
            raise KeyError("format")
        return found
    except FileNotFoundError:
        raise UserError(f"{path}: no such study; vjepa-fast study run makes one") from None
    except (OSError, ValueError, KeyError, TypeError):
        raise UserError(f"{path}: is not a study plan of format {FORMAT}; remove it or choose another folder") from None
