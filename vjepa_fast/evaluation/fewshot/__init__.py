"""Few-shot recognition with frozen features."""

from vjepa_fast.evaluation.fewshot.episodes import EpisodeResult, Episodes, centred, sample_episodes
from vjepa_fast.evaluation.fewshot.logistic import logistic_episodes
from vjepa_fast.evaluation.fewshot.protocols import EPISODE_PROTOCOLS as PROTOCOLS
from vjepa_fast.evaluation.fewshot.protocols import EpisodeProtocol, episode_protocol, evaluate_episodes
from vjepa_fast.evaluation.fewshot.prototype import prototype_episodes

__all__ = [
    "PROTOCOLS",
    "EpisodeProtocol",
    "EpisodeResult",
    "Episodes",
    "centred",
    "episode_protocol",
    "evaluate_episodes",
    "logistic_episodes",
    "prototype_episodes",
    "sample_episodes",
]
