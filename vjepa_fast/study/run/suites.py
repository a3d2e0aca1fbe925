"""What a study is run on: ``synthetic`` (rendered here) or ``paper`` (the user's data sets).

A suite gives the baseline configuration of each regime, the tasks that prepare its data, and what a frozen encoder is
evaluated on: {name: {"kind": "probe" | "fewshot", "clips": path} or {"kind", "manifests": {part: path}}}, parts
train, val (probe only), test; for few-shot train is the base classes and test the novel ones.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from vjepa_fast.config import Config
from vjepa_fast.data.synthetic import SUITES
from vjepa_fast.errors import UserError
from vjepa_fast.study.jobs.pool import Task
from vjepa_fast.study.run.clips import SIZES, WEIGHTS, cached, decode_task, manifests, render_task, view_of
from vjepa_fast.study.run.training import stretched

if TYPE_CHECKING:
    from vjepa_fast.study.instrument.check import Setting
    from vjepa_fast.study.run.paper import Paper

REGIMES = ("single", "mixed")
PUBLISHED = {"single": "ucf101_4gpu_baseline", "mixed": "mixed_4gpu_baseline"}  # the published baseline of each regime
RESERVED = ("objectives", "masks.specs", "compat", "seed", "folder", "data.datasets", "data.datasets_weights")


@dataclass(frozen=True)
class Settings:
    """What all runs of a study share. ``sizes``: clips by suite and part (synthetic); ``data``: {"ssv2.train": path}
    (paper). ``scale`` stretches the runs as ``run.training.stretched``; ``recipe``: of the synthetic baseline.
    """

    suite: str = "synthetic"
    scale: float = 1.0
    recipe: str = "laptop_study"
    overrides: tuple[str, ...] = ()
    device: str = "cpu"  # cpu | cuda
    sizes: dict[str, dict[str, int]] = field(default_factory=lambda: deepcopy(SIZES))
    size: int = 64
    frames: int = 16
    fps: int = 8
    data: dict[str, str] = field(default_factory=dict)
    evaluate: tuple[str, ...] = ()  # empty: the suite's default
    pooling: str = ""  # empty: the suite's
    way: int = 5
    queries: int = 1  # the standard protocol of few-shot action recognition, as way and episodes
    episodes: int = 10_000
    tune: dict[str, str] = field(default_factory=dict)  # paper: few-shot methods and their options
    seed: int = 0  # of rendering, held-out parts and episodes; the same for every run


def settings_of(plan: Mapping[str, Any]) -> Settings:
    """The settings of a study's plan, as ``study.json`` has it."""
    given: Mapping[str, Any] = plan["settings"]
    found: dict[str, Any] = {f.name: given[f.name] for f in fields(Settings) if f.name in given}
    found |= {k: tuple(v) for k, v in found.items() if isinstance(v, list)}
    return Settings(**found)


def suite_of(settings: Settings, folder: str | os.PathLike) -> Synthetic | Paper:
    """The suite named in ``settings``, with its data in ``folder``. Raises UserError for an unknown one."""
    from vjepa_fast.study.run.paper import Paper

    kinds = {"synthetic": Synthetic, "paper": Paper}
    if settings.suite not in kinds:
        raise UserError(f"--suite: {settings.suite!r} is not known; give one of {', '.join(kinds)}")
    for text in settings.overrides:
        key = text.partition("=")[0].strip()
        if any(key == r or key.startswith(r + ".") for r in RESERVED):
            raise UserError(f"--set {text}: the study sets {key} itself, by variant, regime, compat and seed")
    return kinds[settings.suite](settings, Path(folder))


class Suite:
    """What the suites share. ``data``: the user's manifests by ``suite.part``; ``names``: what is evaluated."""

    evaluated: ClassVar[tuple[str, ...]]  # names of the suites that it can evaluate on
    default: ClassVar[tuple[str, ...]] = ()  # those that it evaluates on unless asked for others; empty: all
    own_pooling: ClassVar[str]
    recipes: dict[str, str]  # of each regime's baseline

    def __init__(self, settings: Settings, folder: Path):
        self.settings, self.folder = settings, folder
        self.data: dict[str, str] = {}
        unknown = [name for name in settings.evaluate if name not in self.evaluated]
        if unknown:
            raise UserError(f"--evaluate: {unknown[0]!r} is not known; this suite has {', '.join(self.evaluated)}")
        self.names = tuple(n for n in self.evaluated if n in (settings.evaluate or self.default or self.evaluated))
        self.pooling = settings.pooling or self.own_pooling

    def _load(self, recipe: str, compat: str, seed: int) -> Config:
        from vjepa_fast import config

        return config.load(recipe, [f"compat={compat}", f"seed={seed}", *self.settings.overrides])

    def evaluation(self) -> dict:
        """Plain values of the frozen evaluation, one protocol for every encoder of the study."""
        episodes = {k: getattr(self.settings, k) for k in ("way", "queries", "episodes", "seed")}
        return {"pooling": self.pooling, "view": self.view(), "geometry": {"max_clips": 256, "views": 4}, **episodes}

    def cost_lines(self, jobs: Sequence[Mapping[str, Any]]) -> list[str]:
        """What the runs ``jobs`` will take, as a table; empty where nothing is counted ahead."""
        return []

    def view(self) -> dict[str, int]:
        """The clip that every encoder is evaluated on: the mixed regime's (the single one may read by fps instead)."""
        return view_of(self._load(self.recipes["mixed"], "intended", 0).data)


class Synthetic(Suite):
    """Rendered suites: encoder and steps of ``Settings.recipe``, the published baseline's objectives."""

    evaluated = ("motion8", "order", "objects", "dive", "fewshot", "fewmotion")
    default = ("order", "dive", "fewshot", "fewmotion")  # have passed the instrument check; the others have not
    own_pooling = "tdiff"

    def __init__(self, settings: Settings, folder: Path):
        super().__init__(settings, folder)
        self.recipes = dict.fromkeys(REGIMES, settings.recipe)

    def weights(self, regime: str) -> dict[str, float]:
        """Sampling weights of the data sets that a regime trains on."""
        return WEIGHTS[regime]

    def baseline(self, regime: str, compat: str, seed: int) -> Config:
        """The baseline Config: the recipe, trained by the published objectives.

        The published context loss weighs nothing until step 15,000 and all from 30,000 on, whatever the run's length.
        ``published`` keeps these steps (so never in a short run); ``intended`` takes them as fractions of the 30,000.
        """
        from vjepa_fast import config

        cfg = self._load(self.recipes[regime], compat, seed)
        paper = config.load(PUBLISHED[regime])
        objectives = {term: dict(fields) for term, fields in paper.objectives.items()}
        if compat == "intended":
            steps = paper.optimization.epochs * paper.optimization.ipe
            objectives["context"]["warmup"] = [float(step) / steps for step in objectives["context"]["warmup"]]
        weights = self.weights(regime)
        data = dataclasses.replace(
            cfg.data,
            datasets=tuple(manifests(self.folder, n, self.settings.sizes[n])["train"] for n in weights),
            datasets_weights=tuple(weights.values()),
        )
        return stretched(dataclasses.replace(cfg, data=data, objectives=objectives), self.settings.scale)

    def check(self, regimes: Iterable[str]) -> None:
        """Raise UserError where a suite has no clips that are needed."""
        sizes = self.settings.sizes
        parts = {name: {"train", "val", "test"} for name in self.names}
        for regime in regimes:
            for name in self.weights(regime):
                parts[name] = parts.get(name, set()) | {"train"}
        lacking = [f"{n}.{p}" for n in parts for p in sorted(parts[n]) if not sizes.get(n, {}).get(p)]
        if lacking:
            raise UserError(f"--sizes: no clips for {', '.join(lacking)}; at least one is needed of each")

    def tasks(self, regimes: Iterable[str]) -> list[Task]:
        """Rendering and decoding; every encoder is evaluated on the same decoded clips."""
        s = self.settings
        video = {"size": s.size, "frames": s.frames, "fps": s.fps, "seed": s.seed}
        used = [n for n in s.sizes if n in self.names or any(n in self.weights(r) for r in regimes)]
        view = self.view()
        return [
            *(render_task(self.folder, name, s.sizes[name], video) for name in used),
            *(decode_task(self.folder, name, s.sizes[name], view) for name in self.names),
        ]

    def sources(self) -> dict[str, dict]:
        """What an encoder is evaluated on: the decoded clips."""
        kinds = {n: "fewshot" if SUITES[n].few_shot else "probe" for n in self.names}
        return {n: {"kind": kind, "clips": cached(self.folder, n)} for n, kind in kinds.items()}

    def setting(self) -> Setting:
        """What the instrument check of its suites is made with: the encoder and the clips of every run."""
        from vjepa_fast.study.instrument.check import Setting

        config = self._load(self.recipes["mixed"], "intended", self.settings.seed)
        return Setting(self.settings.size, self.view(), config, self.settings.seed, self.settings.device)

    def cost_lines(self, jobs: Sequence[Mapping[str, Any]]) -> list[str]:
        """What training will take on a GPU, counted from the shapes; nothing for the recipe of a laptop on its CPU."""
        from vjepa_fast.study.run import cost

        trained = [job for job in jobs if job["kind"] != "random"]
        ahead = trained and (self.settings.device == "cuda" or self.settings.recipe != Settings.recipe)
        return cost.table(cost.trained(trained)) if ahead else []
