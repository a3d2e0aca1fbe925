"""The demo's plan: which videos, which runs, what is measured. Everything is fixed here, nothing by the clock."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from copy import deepcopy
from dataclasses import dataclass, field

from vjepa_fast.config import Config
from vjepa_fast.study.instrument.read import POOLING
from vjepa_fast.study.run.clips import SIZES, WEIGHTS
from vjepa_fast.study.run.training import stretched

SUITE_TEXT = {
    "motion8": "direction of motion, 8 of them; no single frame tells it",
    "dive": "order of translation, rotation and scaling",
    "order": "which of two events came first; every class has its time-reverse as another class",
    "objects": "shape x texture x colour of a still image",
    "fewshot": "novel appearances x motions; episodes draw 5 classes never seen with labels",
}
PROBED = ("order", "dive")  # motion8 and objects are trained on alone: they have not passed the instrument check
RENDERED = {
    name: SIZES[name] if name in (*PROBED, "fewshot") else {"train": SIZES[name]["train"]} for name in SUITE_TEXT
}
FULL_MINUTES = 6.0  # what the default plan is made for, on two cores
FIXED_MINUTES = 2.5  # of these, what does not scale with the length of training


@dataclass(frozen=True)
class DemoRun:
    """One pretraining run: a recipe, and the sampling weights of its data sets."""

    name: str
    objective: str
    regime: str  # single | mixed
    recipe: str
    weights: dict[str, float]

    @property
    def key(self) -> str:
        """The run in names of tasks and folders."""
        return f"{self.objective}_{self.regime}"


RUNS = tuple(
    DemoRun(f"{objective} {regime}", objective, regime, f"demo_{objective}_{regime}", weights)
    for regime, weights in WEIGHTS.items()
    for objective in ("baseline", "fwm_hw_ld")
)


@dataclass(frozen=True)
class DemoPlan:
    """Sizes of the demo. ``train_scale`` stretches the runs: iterations, and with them the horizon of the EMA."""

    suites: dict[str, dict[str, int]] = field(default_factory=lambda: deepcopy(RENDERED))
    probed: tuple[str, ...] = PROBED
    size: int = 64  # pixels of the rendered videos
    frames: int = 16
    fps: int = 8
    seed: int = 0
    runs: tuple[DemoRun, ...] = RUNS
    train_scale: float = 1.0
    overrides: tuple[str, ...] = ()  # config overrides for every run, as --set takes them
    pooling: str = POOLING
    supervised_steps: int = 180
    supervised_batch: int = 16
    episodes: int = 1000
    queries: int = 5
    device: str = "cpu"


def plan_for(minutes: float | None, device: str = "cpu") -> DemoPlan:
    """The plan whose training is scaled so that the demo takes about ``minutes`` on two cores (None: as made)."""
    if minutes is None:
        return DemoPlan(device=device)
    scale = max(0.02, (minutes - FIXED_MINUTES) / (FULL_MINUTES - FIXED_MINUTES))
    return DemoPlan(device=device, train_scale=round(scale, 3))


def run_config(
    plan: DemoPlan, run: DemoRun, manifests: Mapping[str, Mapping[str, str]], folder: str, threads: int
) -> Config:
    """The resolved Config of one run: its recipe, the rendered manifests, and the plan's scale."""
    from vjepa_fast import config

    cfg = config.load(run.recipe, list(plan.overrides))
    names = list(run.weights)
    data = dataclasses.replace(
        cfg.data,
        datasets=tuple(manifests[n]["train"] for n in names),
        datasets_weights=tuple(run.weights[n] for n in names),
    )
    runtime = dataclasses.replace(cfg.runtime, device=plan.device, threads=threads, tensorboard=False)
    return stretched(dataclasses.replace(cfg, data=data, runtime=runtime, folder=folder), plan.train_scale)
