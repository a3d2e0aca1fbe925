"""How few-shot accuracies are measured and averaged: the protocols of the literature, every number an argument."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, replace

import numpy as np

from vjepa_fast.errors import ConfigError
from vjepa_fast.evaluation.choices import check_choice
from vjepa_fast.evaluation.extract.features import Features
from vjepa_fast.evaluation.fewshot.episodes import EpisodeResult
from vjepa_fast.evaluation.fewshot.logistic import logistic_episodes
from vjepa_fast.evaluation.fewshot.prototype import prototype_episodes
from vjepa_fast.evaluation.intervals import mean_ci95, student_ci95

CLASSIFIERS: dict[str, Callable[..., EpisodeResult]] = {"prototype": prototype_episodes, "logistic": logistic_episodes}
INTERVALS = ("normal", "student")


@dataclass(frozen=True)
class EpisodeProtocol:
    """N-way K-shot episodes and the interval over them.

    ``interval``: "normal", 1.96 std / sqrt(n) with the population std; "student", Student's t times the standard error.
    ``group``: the interval is over means of so many episodes in the order they were drawn; it must divide ``episodes``.
    """

    name: str = "action"
    way: int = 5
    shots: tuple[int, ...] = (1, 5)
    queries: int = 1  # per class and episode
    episodes: int = 10_000
    seed: int = 0
    interval: str = "normal"
    group: int = 1

    def __post_init__(self):
        for name in ("way", "queries", "episodes", "group"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name}: {getattr(self, name)} is not a positive number")
        if not self.shots or min(self.shots) < 1:
            raise ConfigError(f"shots: needs positive numbers, got {self.shots}")
        check_choice("interval", self.interval, INTERVALS)
        if self.episodes % self.group:
            raise ConfigError(f"episodes: {self.episodes} cannot be averaged in groups of {self.group}")
        if self.interval == "student" and self.episodes // self.group < 2:
            raise ConfigError(f"episodes: Student's t needs at least two means, {self.episodes} episodes give one")

    def ci95(self, accuracies: np.ndarray) -> tuple[float, float]:
        """(mean, half-width of the 95 % interval) of accuracies float ``[episodes]``."""
        means = np.asarray(accuracies, dtype=np.float64).reshape(-1, self.group).mean(1)
        return student_ci95(means) if self.interval == "student" else mean_ci95(means)

    @property
    def text(self) -> str:
        """One line for people."""
        over = f"{self.episodes // self.group:,} means of {self.group} episodes" if self.group > 1 else "episodes"
        how = {"normal": "1.96 std / sqrt(n)", "student": "Student's t"}[self.interval]
        return (
            f"{self.name}: {self.way}-way, {self.queries} quer{'y' if self.queries == 1 else 'ies'} per class, "
            f"{self.episodes:,} episodes, 95 % interval {how} over {over}, seed {self.seed}"
        )


EPISODE_PROTOCOLS = {
    # what OTAM, TRX, HyRSM and MoLo report on
    "action": EpisodeProtocol(),
    # arXiv:2003.04390, test_few_shot.py: 10 x 200 batches of four episodes
    "meta_baseline": EpisodeProtocol("meta_baseline", queries=15, episodes=8_000, interval="student", group=4),
    # arXiv:2203.07057, test_few_shot.py
    "sun": EpisodeProtocol("sun", queries=15, episodes=2_000, interval="student"),
}


def episode_protocol(name: str = "action", **changes) -> EpisodeProtocol:
    """The protocol ``name`` with those ``changes`` to its fields that are not None. ConfigError for unknown names."""
    check_choice("protocol", name, EPISODE_PROTOCOLS)
    for key in changes:
        check_choice("field of an episode protocol", key, [f.name for f in fields(EpisodeProtocol)])
    return replace(EPISODE_PROTOCOLS[name], **{k: v for k, v in changes.items() if v is not None})


def evaluate_episodes(
    novel: Features, protocol: EpisodeProtocol = EPISODE_PROTOCOLS["action"], classifier: str = "prototype", **options
) -> list[EpisodeResult]:
    """One result per number of shots of ``protocol``. ``options`` go to the classifier: base, center, l2, and metric
    (prototype) or c (logistic). Raises DataError and ConfigError as the classifier does.
    """
    check_choice("few-shot classifier", classifier, CLASSIFIERS)
    p, run = protocol, CLASSIFIERS[classifier]
    return [run(novel, p.way, shot, p.queries, p.episodes, p.seed, interval=p.ci95, **options) for shot in p.shots]
