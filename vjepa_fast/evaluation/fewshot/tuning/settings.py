"""Settings of the methods that train: of a classifier's training, of the meta stage, and what all share."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch

from vjepa_fast.errors import ConfigError


def parse_trunk(trunk: str | int) -> str | int:
    """What ``trunk`` means: "all", "head", or a number of last blocks (also as text: "2", "last 2 blocks").
    ConfigError otherwise.
    """
    text = str(trunk).strip().lower()
    if text in ("all", "head"):
        return text
    number = text.removeprefix("last").removesuffix("s").removesuffix("block").strip()
    if number.isdigit() and int(number):
        return int(number)
    raise ConfigError(f"trunk: {trunk!r}; accepted: all, head, or the number of last blocks to train")


@dataclass(frozen=True)
class FitSettings:
    """Training of a classifier; default values from Classifier-Baseline (arXiv:2003.04390, section 4.2).

    ``schedule="step"``: the rate times ``gamma`` at each of ``milestones`` (epochs); "cosine": to 0 over the run. Both
    begin with ``warmup`` epochs from 0.
    """

    epochs: int = 100
    batch_size: int = 128
    optimizer: str = "sgd"  # or adamw
    lr: float = 0.1
    momentum: float = 0.9
    weight_decay: float = 5e-4
    schedule: str = "step"
    milestones: tuple[int, ...] = (90,)
    gamma: float = 0.1
    warmup: float = 0.0

    def __post_init__(self):
        if self.epochs < 0 or self.batch_size < 1 or not self.lr > 0:
            raise ConfigError(
                f"few-shot tuning: epochs {self.epochs}, batch_size {self.batch_size}, lr {self.lr}; expected 0 or "
                "more, 1 or more, above 0"
            )
        if self.optimizer not in ("sgd", "adamw") or self.schedule not in ("step", "cosine"):
            raise ConfigError(
                f"few-shot tuning: optimizer {self.optimizer!r} and schedule {self.schedule!r}; accepted: sgd or "
                "adamw, step or cosine"
            )

    def rate(self, epoch: int, step: int, steps: int) -> float:
        """The factor of ``lr`` in step ``step`` of the ``steps`` of ``epoch``, both from 0."""
        done = epoch + step / steps
        if done < self.warmup:
            return min(1.0, (done + 1 / steps) / self.warmup)
        if self.schedule == "step":
            return self.gamma ** sum(epoch >= m for m in self.milestones)
        return 0.5 * (1 + math.cos(math.pi * (done - self.warmup) / (self.epochs - self.warmup)))


@dataclass(frozen=True)
class MetaSettings:
    """The meta stage; default values from Meta-Baseline (arXiv:2003.04390, section 4.2 and its released code).

    An epoch is ``steps`` steps of ``episodes_per_step`` episodes. ``reduce_way``: with fewer base classes than ``way``
    take all there are and say so, instead of refusing.
    """

    epochs: int = 20
    steps: int = 200
    episodes_per_step: int = 4
    way: int = 5
    shot: int = 1
    queries: int = 15
    temperature: float = 10.0  # where the learnable factor of the cosine starts
    lr: float = 1e-3
    momentum: float = 0.9
    weight_decay: float = 5e-4
    milestones: tuple[int, ...] = ()  # constant rate
    gamma: float = 0.5
    val_way: int = 5
    val_queries: int = 15
    val_episodes: int = 800
    reduce_way: bool = False

    def __post_init__(self):
        counts = {k: getattr(self, k) for k in ("steps", "episodes_per_step", "shot", "queries", "val_queries")}
        counts |= {"val_episodes": self.val_episodes, "lr": self.lr, "temperature": self.temperature}
        low = [f"{k} {v}" for k, v in counts.items() if not v > 0]
        low += [f"{k} {v} (2 or more)" for k, v in (("way", self.way), ("val_way", self.val_way)) if v < 2]
        if low or self.epochs < 0:
            raise ConfigError(f"meta stage: {', '.join(low) or f'epochs {self.epochs}'} is too small")


@dataclass(frozen=True)
class TuneSettings:
    """What all tuned methods share.

    ``trunk``: what is trained: "all" of the encoder, its last blocks (a number), or "head", a linear projection that
    starts as the identity over a frozen encoder. ``way``, ``shots``, ``queries``, ``episodes``: of the test on novel
    classes. ``chunk``: clips that go through the encoder at once, but for an episode's, which go together.
    """

    trunk: str | int = "all"
    pooling: str = "time"
    level: str = "last"
    meta: MetaSettings = MetaSettings()
    way: int = 5
    shots: tuple[int, ...] = (1, 5)
    queries: int = 1
    episodes: int = 10_000
    chunk: int = 64
    workers: int = 0  # threads that decode clips of a manifest too large for memory
    num_frames: int | None = None  # of a manifest's clips; None: as the encoder was trained
    crop_size: int | None = None
    frame_step: int | None = None
    short: str | None = None  # "hold" repeats the last frame of a manifest's short videos; None refuses them

    def __post_init__(self):
        parse_trunk(self.trunk)
        if self.way < 2 or not self.shots or min(*self.shots, self.queries, self.episodes, self.chunk) < 1:
            raise ConfigError(
                f"few-shot test: way {self.way}, shots {self.shots}, queries {self.queries}, episodes {self.episodes}, "
                f"chunk {self.chunk}; expected 2 or more ways, at least one shot and 1 or more of the others"
            )


@dataclass(frozen=True)
class Setup:
    """What all stages of one tuning share. ``chunk``: clips through the encoder at once; ``report`` gets a line of text
    per epoch.
    """

    chunk: int = 64
    seed: int = 0
    device: torch.device = torch.device("cpu")
    report: Callable[[str], None] | None = None

    def say(self, text: str) -> None:
        """Report a line."""
        if self.report is not None:
            self.report(text)


PLAIN = Setup()
