"""Which model, and how many steps of it, fit a machine and a time: `choose`, by steps that are made and timed.

The sizes are rows of ``data/sizes.json``: a name, the fewest ``steps`` that make it worth while, the ``batch`` of a
step and what is ``set`` in the recipe.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from vjepa_fast import config as configs
from vjepa_fast.config.length import length
from vjepa_fast.config.schema import Config
from vjepa_fast.data.loader import ClipLoader
from vjepa_fast.errors import UserError
from vjepa_fast.files import parse_json
from vjepa_fast.trainer import precision
from vjepa_fast.trainer.distributed import Distributed
from vjepa_fast.trainer.methods import METHODS
from vjepa_fast.trainer.signals import process_settings_kept
from vjepa_fast.trainer.step import resolve_device

TABLE = Path(__file__).parent / "data" / "sizes.json"
SECONDS = 2.0  # of steps that are timed, of each size that is tried
TOKENS_AT_ONCE = 4096  # on a CPU: larger batches take more memory and are no faster
HORIZON = 0.044, 20, 1333  # of the moving average: share of the steps, fewest, most; the published 1,333 of 30,000


@dataclass(frozen=True)
class Size:
    """A row of the table."""

    name: str
    steps: int
    batch: int
    set: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Choice:
    """What was chosen.

    Attributes:
        size: of the table. cfg: the recipe with it. steps: optimiser steps. seconds: of one of them, as measured.
        tried: seconds of a step of each size that was measured, by name; None where memory ran out.
    """

    size: Size
    cfg: Config
    steps: int
    seconds: float
    tried: dict[str, float | None]

    def __str__(self) -> str:
        o, data = self.cfg.optimization, self.cfg.data
        device = resolve_device(self.cfg.runtime.device)
        frames = f"{data.crop_size} px, {data.dataset_fpcs[0]} frames"
        clips = data.batch_size * o.accumulate
        took = _span(self.steps * self.seconds)
        where = "this GPU" if device.type == "cuda" else f"this {device.type.upper()}"
        return f"{self.size.name}, {frames}, {self.steps:,} steps of {clips} clips, about {took} on {where}"


def read_sizes(path: Path = TABLE) -> list[Size]:
    """The table, from the smallest to the largest."""
    return [Size(**row) for row in parse_json(path.read_text(encoding="utf-8"))]


def choose(
    recipe: str,
    fixed: Sequence[str],
    *,
    minutes: float,
    own: Sequence[str] = (),
    steps: int | None = None,
    sizes: Sequence[Size] | None = None,
    timed: Callable[[Config], float | None] | None = None,
) -> Choice:
    """The largest size whose fewest steps, or ``steps``, are made within ``minutes``.

    The smallest is measured, then the largest that should fit by its arithmetic, until none larger fits. Where not even
    the smallest fits, it is taken with the steps that there is time for, ten at least.

    Args:
        recipe: what the sizes change.
        fixed: overrides below those of the size, such as the manifest.
        minutes: the time for all steps.
        own: overrides of the user, above those of the size.
        steps: the length, where it is given.
        sizes: in place of the table.
        timed: in place of `seconds_per_step`.

    Raises:
        UserError: the data cannot be read, or no size fits the memory.
    """
    sizes, timed = list(sizes or read_sizes()), timed or seconds_per_step
    configured = [_configured(recipe, size, fixed, own) for size in sizes]
    budget, tried = 60 * minutes, dict[int, float | None]()
    best, limit = -1, len(sizes)

    def fits(i: int, seconds: float) -> bool:
        return seconds * (steps or sizes[i].steps) <= budget

    def expected(i: int) -> float:
        known = tried[best] or 0.0
        return known * work(configured[i]) / work(configured[best])

    while True:
        larger = [0] if best < 0 else [i for i in range(best + 1, limit) if fits(i, expected(i))]
        if not larger or larger[-1] >= limit:
            break
        i = larger[-1]
        seconds = tried[i] = timed(configured[i])
        if seconds is not None and (i == 0 or fits(i, seconds)):
            best = i
        else:
            limit = i
    if best < 0:
        raise UserError("not even the smallest model fits the memory; lower data.batch_size or data.crop_size by --set")
    seconds = tried[best]
    assert seconds is not None
    epochs = configured[best].optimization.epochs
    many = steps or max(epochs, _round(budget / seconds) // epochs * epochs)
    cfg = configs.load(recipe, [*overrides(configured[best], sizes[best], fixed, many, seconds), *own])
    o = cfg.optimization
    found = {sizes[i].name: tried[i] for i in tried}
    return Choice(sizes[best], cfg, o.epochs * o.ipe, seconds, found)


def work(cfg: Config) -> float:
    """Arithmetic of an optimiser step up to a factor: of encoder and predictor, weights and attention."""
    from vjepa_fast.models.vit import SIZES

    data, model, named = cfg.data, cfg.model, SIZES[cfg.model.model_name]
    tokens = data.dataset_fpcs[0] // data.tubelet_size * (data.crop_size // data.patch_size) ** 2

    def stack(width: int, depth: int) -> float:
        return depth * tokens * width * (12 * width + 2 * tokens)

    of_encoder = stack(model.embed_dim or named.embed_dim, model.depth or named.depth)
    clips = data.batch_size * cfg.optimization.accumulate
    return clips * (of_encoder + stack(model.pred_embed_dim, model.pred_depth))


def seconds_per_step(cfg: Config) -> float | None:
    """Seconds of an optimiser step on this machine, reading the data included; None where the memory does not suffice.

    One of its micro-batches is made and thrown away, then others for `SECONDS`, at least one. On CUDA nothing is
    compiled or captured for it, so that the run itself will be faster.
    """
    device = resolve_device(cfg.runtime.device)
    accumulate = cfg.optimization.accumulate
    plain = configs.to_dict(cfg)
    plain["optimization"]["accumulate"] = 1
    plain["runtime"] |= {"compile": False, "cuda_graphs": False, "epilogues": False, "peak_tflops": 1.0}
    cfg = configs.from_dict(plain)
    with process_settings_kept():
        if cfg.runtime.threads:
            torch.set_num_threads(cfg.runtime.threads)
        try:
            dtype, _ = precision.choose(cfg, device, Distributed())
            step = METHODS[cfg.method](cfg, device=device, dtype=dtype)
            with ClipLoader(cfg) as loader:
                return accumulate * _timed(step, loader, device)
        except torch.OutOfMemoryError:
            torch.cuda.empty_cache()
            return None


def _timed(step: Callable[..., Any], loader: ClipLoader, device: torch.device) -> float:
    def wait() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    step(next(loader), 0)
    wait()
    begin, made = time.perf_counter(), 0
    while made == 0 or time.perf_counter() - begin < SECONDS:
        made += 1
        step(next(loader), made)
        wait()
    return (time.perf_counter() - begin) / made


def overrides(cfg: Config, size: Size, fixed: Sequence[str], steps: int, seconds: float) -> list[str]:
    """What makes the recipe a run of ``steps`` steps of a size that take ``seconds`` each."""
    share, low, high = HORIZON
    horizon = min(high, max(low, share * steps))
    lr = size.set.get("optimization.lr", cfg.optimization.lr)
    log = max(1, min(round(15 / seconds), steps))
    values = {
        "data.batch_size": cfg.data.batch_size,
        "optimization.accumulate": cfg.optimization.accumulate,
        "optimization.start_lr": lr / 20,
        "optimization.final_lr": lr / 100,
        "target.ema": [round(1 - 1 / horizon, 6), round(1 - 1 / (5 * horizon), 6)],
        "runtime.log_every": log,
        "runtime.monitor_every": log * max(1, steps // 50 // log),
        "runtime.save_every": max(1, min(round(300 / seconds), steps)),
    }
    return [*fixed, *_texts(size.set), *_texts(values), *length(steps, cfg.optimization)]


def _configured(recipe: str, size: Size, fixed: Sequence[str], own: Sequence[str]) -> Config:
    """The recipe with a size, its batch in micro-batches where the device wants that."""
    cfg = configs.load(recipe, [*fixed, *_texts(size.set), f"data.batch_size={size.batch}", *own])
    if cfg.data.batch_size != size.batch:
        return cfg  # the user's
    if resolve_device(cfg.runtime.device).type == "cuda":
        return cfg
    data = cfg.data
    tokens = data.dataset_fpcs[0] // data.tubelet_size * (data.crop_size // data.patch_size) ** 2
    parts = 1
    while size.batch % (2 * parts) == 0 and size.batch // parts * tokens > TOKENS_AT_ONCE and size.batch // parts > 4:
        parts *= 2
    batch = [f"data.batch_size={size.batch // parts}", f"optimization.accumulate={parts}"]
    return configs.load(recipe, [*fixed, *_texts(size.set), *batch, *own])


def _texts(values: dict[str, Any]) -> list[str]:
    return [f"{key}={json.dumps(value)}" for key, value in values.items()]


def _round(steps: float) -> int:
    """Two digits and zeros, at least 10."""
    steps = max(10, int(steps))
    unit = 10 ** max(1, len(str(steps)) - 2)
    return steps // unit * unit


def _span(seconds: float) -> str:
    if seconds < 90:
        return f"{max(1, round(seconds))} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def cores() -> int:
    """CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
