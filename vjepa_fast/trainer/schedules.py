"""Schedules as pure functions of the step, so that a resumed run needs no schedule state.

All of them are those of the FAIR V-JEPA code, which the study (arXiv:2605.17165) trains with. ``step`` counts optimiser
steps from 1 for learning rate and weight decay (the published schedulers step before the update) and from 0 for the
EMA momentum (the published one is a generator whose first value is its start).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from vjepa_fast.config.schema import Config
from vjepa_fast.errors import ConfigError


def warmup_cosine_lr(step: int, *, warmup: int, total: int, start: float, peak: float, final: float) -> float:
    """Linear from ``start`` to ``peak`` over ``warmup`` steps, then a cosine to ``final`` at step ``total``.

    Past ``total`` the cosine rises again, as published (``ipe_scale`` > 1 is there to avoid it).
    """
    if step < warmup:
        return start + (peak - start) * step / max(1, warmup)
    progress = (step - warmup) / max(1, total - warmup)
    return max(final, final + (peak - final) * 0.5 * (1.0 + math.cos(math.pi * progress)))


def linear_lr(step: int, *, total: int, start: float, final: float) -> float:
    """Linear from ``start`` (step 0) to ``final`` (step ``total``), then constant: that of the published cooldown.

    Past ``total`` the published one goes on falling, below 0; no published file gets there (``ipe_scale`` is 1.25).
    """
    return start + (final - start) * min(1.0, step / max(1, total))


def cosine_weight_decay(step: int, *, total: int, start: float, final: float) -> float:
    """Cosine from ``start`` (step 0) to ``final`` (step ``total``), never beyond ``final``."""
    value = final + (start - final) * 0.5 * (1.0 + math.cos(math.pi * step / max(1, total)))
    return max(final, value) if final <= start else min(final, value)


def ema_momentum(step: int, *, total: int, start: float, final: float) -> float:
    """Linear from ``start`` (step 0) to ``final`` (step ``total``), then constant."""
    value = start + step * (final - start) / max(1, total)
    return min(value, final) if final >= start else max(value, final)


@dataclass(frozen=True)
class Schedules:
    """The schedules of one run. Methods take the 0-based index of the optimiser step that is about to be made."""

    total_steps: int  # steps of the run: epochs * ipe
    horizon: int  # steps that the schedules are stretched over: ipe_scale * total_steps
    warmup: int
    lrs: tuple[float, float, float]  # start, peak, final
    decays: tuple[float, float]
    momenta: tuple[float, float]
    ipe: int
    epochs: int
    linear: bool = False  # the learning rate, from its peak

    @classmethod
    def from_config(cls, cfg: Config) -> Schedules:
        """Those of a configuration."""
        o = cfg.optimization
        if not o.ipe:
            raise ConfigError("optimization.ipe: 0, a pass over the data, which `train` counts first; give a number")
        return cls(
            total_steps=o.epochs * o.ipe,
            horizon=int(o.ipe_scale * o.epochs * o.ipe),
            warmup=int(o.warmup * o.ipe),
            lrs=(o.start_lr, o.lr, o.final_lr),
            decays=(o.weight_decay, o.final_weight_decay),
            momenta=(1.0, 1.0) if cfg.target.mode == "frozen" else cfg.target.ema,
            ipe=o.ipe,
            epochs=o.epochs,
            linear=o.schedule == "linear",
        )

    def lr(self, index: int) -> float:
        """Learning rate of the step."""
        start, peak, final = self.lrs
        if self.linear:
            return linear_lr(index + 1, total=self.horizon, start=peak, final=final)
        return warmup_cosine_lr(index + 1, warmup=self.warmup, total=self.horizon, start=start, peak=peak, final=final)

    def weight_decay(self, index: int) -> float:
        """Weight decay of the step, of those parameters that decay."""
        start, final = self.decays
        return cosine_weight_decay(index + 1, total=self.horizon, start=start, final=final)

    def momentum(self, index: int) -> float:
        """Momentum of the moving average that follows the step."""
        start, final = self.momenta
        return ema_momentum(index, total=self.horizon, start=start, final=final)

    def epoch(self, index: int) -> int:
        """0-based epoch of the step."""
        return index // self.ipe
