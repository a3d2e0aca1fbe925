"""Few-shot recognition with frozen features."""

from vjepa_fast.evaluation.fewshot.prototype import (
    EpisodeResult,
    Episodes,
    centred,
    prototype_episodes,
    sample_episodes,
)

__all__ = ["EpisodeResult", "Episodes", "centred", "prototype_episodes", "sample_episodes"]
