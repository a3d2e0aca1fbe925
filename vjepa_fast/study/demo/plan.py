"""The demo's plan: which videos, which runs, what is measured. Everything is fixed here, nothing by the clock."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field

SUITE_TEXT = {
    "motion8": "direction of motion, 8 of them; no single frame tells it",
    "dive": "order of translation, rotation, scaling, and sense of rotation",
    "order": "which of two events came first; every class has its time-reverse as another class",
    "objects": "shape x texture x colour of a still image",
    "fewshot": "novel appearances x motions; episodes draw 5 classes never seen with labels",
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
        return f"{self.objective}_{self.regime}"


SINGLE = {"dive": 0.5, "motion8": 0.5}
MIXED = {"dive": 0.1, "motion8": 0.1, "order": 0.6, "objects": 0.2}
RUNS = tuple(
    DemoRun(f"{objective} {regime}", objective, regime, f"demo_{objective}_{regime}", weights)
    for regime, weights in (("single", SINGLE), ("mixed", MIXED))
    for objective in ("baseline", "fwm_hw_ld")
)


@dataclass(frozen=True)
class DemoPlan:
    """Sizes of the demo. ``train_scale`` stretches the runs: iterations, and with them the horizon of the EMA."""

    suites: dict[str, dict[str, int]] = field(
        default_factory=lambda: {
            "motion8": {"train": 800, "val": 200, "test": 480},
            "order": {"train": 720, "val": 180, "test": 480},
            "objects": {"train": 960, "val": 240, "test": 480},
            "dive": {"train": 600},
            "fewshot": {"train": 432, "val": 72, "test": 480},
        }
    )
    probed: tuple[str, ...] = ("motion8", "order", "objects")
    size: int = 64  # pixels of the rendered videos
    frames: int = 16
    fps: int = 8
    seed: int = 0
    runs: tuple[DemoRun, ...] = RUNS
    train_scale: float = 1.0
    overrides: tuple[str, ...] = ()  # config overrides for every run, as --set takes them
    pooling: str = "time"
    supervised_steps: int = 180
    supervised_batch: int = 16
    episodes: int = 1000
    queries: int = 10
    device: str = "cpu"


def plan_for(minutes: float | None, device: str = "cpu") -> DemoPlan:
    """The plan whose training is stretched or cut so that the demo takes about ``minutes`` on two cores (None: as
    made).
    """
    if minutes is None:
        return DemoPlan(device=device)
    scale = max(0.02, (minutes - FIXED_MINUTES) / (FULL_MINUTES - FIXED_MINUTES))
    return DemoPlan(device=device, train_scale=round(scale, 3))


def run_config(plan: DemoPlan, run: DemoRun, manifests: dict[str, dict[str, str]], folder: str, threads: int):
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


def stretched(cfg, scale: float):
    """``cfg`` with ``scale`` times as many iterations, and the horizon of the EMA stretched with them."""
    if scale == 1.0:
        return cfg
    opt = dataclasses.replace(cfg.optimization, ipe=max(1, round(cfg.optimization.ipe * scale)))
    target = dataclasses.replace(cfg.target, ema=tuple(1 - min(1.0, (1 - m) / scale) for m in cfg.target.ema))
    return dataclasses.replace(cfg, optimization=opt, target=target)


def settings_text(cfg, weights: dict[str, float]) -> dict[str, str]:
    """A run's settings, one printable line each, for the report."""
    data, model, opt, target = cfg.data, cfg.model, cfg.optimization, cfg.target
    specs = [
        f"{m.num_blocks} x {m.spatial_scale[0]:g}" + (" motion-guided" if m.motion_guided else "")
        for m in cfg.masks.specs
    ]
    return {
        "data": ", ".join(f"{w:g} {name}" for name, w in weights.items()),
        "clips": f"{max(data.dataset_fpcs)} frames, step {data.frame_sample_rate or 1}, {data.crop_size} px, "
        f"batch {data.batch_size}",
        "encoder": f"width {model.embed_dim or model.model_name}, depth {model.depth or ''}, {model.levels} levels, "
        f"tubelets {data.tubelet_size} x {data.patch_size} x {data.patch_size}",
        "predictor": f"width {model.pred_embed_dim}, depth {model.pred_depth}",
        "objectives": "; ".join(
            name + (" " + " ".join(f"{k}={_short(v)}" for k, v in fields.items()) if fields else "")
            for name, fields in cfg.objectives.items()
        ),
        "masks": "; ".join(specs),
        "steps": str(int(opt.epochs * opt.ipe * opt.ipe_scale)),
        "learning rate": f"{opt.start_lr:g} to {opt.lr:g} to {opt.final_lr:g}, "
        f"warm-up {opt.warmup:g} of {opt.epochs} epochs",
        "weight decay": f"{opt.weight_decay:g}"
        + (f" to {opt.final_weight_decay:g}" if opt.final_weight_decay != opt.weight_decay else ""),
        "target": f"{target.mode}, momentum {target.ema[0]:.5g} to {target.ema[1]:.5g}",
        "compat": cfg.compat,
        "seed": str(cfg.seed),
    }


def _short(value) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)
