"""What a run says before its first step: where it runs, what it trains, how long it will take; and what looks wrong."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch

from vjepa_fast.config.fields import is_fraction
from vjepa_fast.config.schema import Config
from vjepa_fast.data.loader import Batch, ClipGroup
from vjepa_fast.errors import UserError
from vjepa_fast.objectives import OBJECTIVES
from vjepa_fast.trainer.progress import DAY, duration, long_run
from vjepa_fast.trainer.run_folder import device_name
from vjepa_fast.trainer.schedules import Schedules
from vjepa_fast.trainer.step import TrainStep

if TYPE_CHECKING:
    from vjepa_fast.trainer.levjepa import LevjepaStep
    from vjepa_fast.trainer.trainer import Trainer

LONG_S = 1.0  # a step of less is not estimated: it will be made at once, and much of it is not arithmetic
SHARE = 0.6  # of the peak of a CPU that a step comes to, for a first estimate; a GPU makes its first steps at once


def lines(run: Trainer, end: int) -> list[str]:
    """The banner and the warnings, one line each, of a run that is to stop at step ``end``; of the first process."""
    cfg, step, done = run.cfg, run.step, run.done
    if not step.world.main:
        return []
    data, o = cfg.data, cfg.optimization
    trained = sum(p.numel() for p in step.params)
    encoder = sum(p.numel() for p in step.encoder.parameters())
    grid = math.prod(step.encoder.grid((1, 3, max(data.dataset_fpcs), data.crop_size, data.crop_size)))
    clips = data.batch_size * o.accumulate * step.world.world
    frames = " or ".join(map(str, dict.fromkeys(data.dataset_fpcs)))
    dtype = str(step.dtype).removeprefix("torch.")
    found = [
        f"{step.device} ({device_name(step.device)}), {dtype}; {trained / 1e6:.1f} M parameters trained, "
        f"{encoder / 1e6:.1f} M of them the encoder's",
        f"{frames} frames of {data.crop_size} px, {grid:,} tokens per clip; {end - done:,} steps of {clips} clips; "
        f"{run.folder}",
    ]
    seconds = estimated_seconds(cfg, step, run.metrics.peak)
    if seconds is not None and seconds > LONG_S:
        left = seconds * (end - done)
        found.append(
            f"estimated: {clips / seconds:.3g} clips/s, ETA {duration(left)}; the first steps will tell "
            "(data and what else runs here are not part of it)"
        )
        if left > DAY:
            found.append(long_run(left))
    return found + warnings(cfg)


def estimated_seconds(cfg: Config, step: TrainStep | LevjepaStep, peak: float | None) -> float | None:
    """Seconds of an optimiser step on a CPU, by its arithmetic; None elsewhere."""
    if peak is None or step.device.type != "cpu" or not isinstance(step, TrainStep):
        return None
    data = cfg.data
    frames = max(data.dataset_fpcs)
    shape = (data.batch_size, 3, frames, data.crop_size, data.crop_size)
    clip = torch.zeros(shape, dtype=torch.uint8)
    labels = torch.zeros(data.batch_size, dtype=torch.int64)
    kind = "image" if frames == 1 else "video"
    group = ClipGroup(clip, labels, labels, [""] * data.batch_size, frames, kind, 0)
    try:
        work = step.work(step.stage(Batch([group], 0), 0), 0)
    except UserError:  # masks that leave no context are said when they are drawn
        return None
    return cfg.optimization.accumulate * work.flops / (SHARE * peak)


def warnings(cfg: Config) -> list[str]:
    """What of the schedules does not fit the length of the run."""
    schedules, found = Schedules.from_config(cfg), list[str]()
    steps = schedules.total_steps
    if schedules.warmup > steps:
        found.append(
            f"warning: optimization.warmup: {cfg.optimization.warmup:g} epochs are {schedules.warmup:,} of the "
            f"{steps:,} steps, so the learning rate never reaches optimization.lr; set optimization.warmup lower"
        )
    if cfg.method != "vjepa":
        return found
    for name, given in cfg.objectives.items():
        start, last = _ramp(cfg, name, given)
        if start >= steps:
            found.append(
                f"warning: objectives.{name}.warmup: begins at step {start:,}, and the run has {steps:,}: this term "
                f"never counts; {_remedy(cfg, name)}"
            )
        elif last > steps:
            reached = (steps - start) / (last - start)
            found.append(
                f"warning: objectives.{name}.warmup: ends at step {last:,}, and the run has {steps:,}: this term "
                f"comes to {reached:.0%} of its weight; {_remedy(cfg, name)}"
            )
    return found


def _ramp(cfg: Config, name: str, given: Mapping[str, Any]) -> tuple[int, int]:
    """First and last step of a term's warm-up where it is given in steps; (0, 0) where it is a share of the run."""
    default = getattr(OBJECTIVES[name], "warmup", None) if name in OBJECTIVES else None
    ramp = given.get("warmup", default)
    if name == "context" and cfg.loss.context_warmup is not None:
        ramp = cfg.loss.context_warmup
    if not isinstance(ramp, (list, tuple)) or len(ramp) != 2:
        return 0, 0
    first, last = (0 if is_fraction(x) else int(x) for x in ramp)
    return first, last


def _remedy(cfg: Config, name: str) -> str:
    whole = name == "context" and cfg.loss.context_warmup is not None
    return (
        f"--set {'loss.context_warmup' if whole else f'objectives.{name}.warmup'}=[0.5,1.0] makes it a share of the run"
    )
