"""The published schedules, stateful as they are: each ``step()`` advances by one and sets the optimiser's groups."""

from __future__ import annotations

import math


class WarmupCosineLR:
    """Linear from ``start`` to ``ref`` over ``warmup`` steps, then cosine to ``final`` over the rest of ``total``."""

    def __init__(self, optimizer, *, warmup: int, start: float, ref: float, final: float, total: int):
        self.optimizer = optimizer
        self.warmup, self.start, self.ref, self.final = warmup, start, ref, final
        self.rest = total - warmup
        self.count = 0

    def step(self) -> float:
        """The learning rate of the next step."""
        self.count += 1
        if self.count < self.warmup:
            lr = self.start + self.count / max(1, self.warmup) * (self.ref - self.start)
        else:
            progress = (self.count - self.warmup) / max(1, self.rest)
            lr = max(self.final, self.final + (self.ref - self.final) * 0.5 * (1.0 + math.cos(math.pi * progress)))
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        return lr


class LinearDecayLR:
    """Linear from ``ref`` to ``final`` over ``total`` steps (annealing runs)."""

    def __init__(self, optimizer, *, ref: float, final: float, total: int):
        self.optimizer = optimizer
        self.ref, self.final, self.total = ref, final, total
        self.count = 0

    def step(self) -> float:
        """The learning rate of the next step."""
        self.count += 1
        lr = self.ref + self.count / max(1, self.total) * (self.final - self.ref)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        return lr


class CosineWD:
    """Cosine from ``ref`` to ``final``, not past it; groups with ``WD_exclude`` keep their weight decay."""

    def __init__(self, optimizer, *, ref: float, final: float, total: int):
        self.optimizer = optimizer
        self.ref, self.final, self.total = ref, final, total
        self.count = 0

    def step(self) -> float:
        """The weight decay of the next step."""
        self.count += 1
        wd = self.final + (self.ref - self.final) * 0.5 * (1.0 + math.cos(math.pi * self.count / self.total))
        wd = max(self.final, wd) if self.final <= self.ref else min(self.final, wd)
        for group in self.optimizer.param_groups:
            if not group.get("WD_exclude", False):
                group["weight_decay"] = wd
        return wd


def momentum(ema, ipe: int, epochs: int, ipe_scale: float):
    """Yields the EMA momentum of each step: linear from ema[0], at most ema[1]."""
    for i in range(int(ipe * epochs) + 1):
        yield min(ema[0] + i * (ema[1] - ema[0]) / (ipe * epochs * ipe_scale), ema[1])


def context_weight(value: float, step: int, start: float = 15000, end: float = 30000) -> float:
    """Lambda: 0 until ``start``, linear to ``value`` at ``end``."""
    if step < start:
        return 0.0
    return value * min(1.0, (step - start) / (end - start)) if end > start else value


def kinematic_anneal(coeff: float, epoch: int, epochs: int) -> float:
    """Cosine from ``coeff`` to 0."""
    return coeff * 0.5 * (1.0 + math.cos(math.pi * epoch / epochs))
