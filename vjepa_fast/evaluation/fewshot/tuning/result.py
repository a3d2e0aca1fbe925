"""A tuned model and how it came about, and its test on the novel classes."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field

import torch

from vjepa_fast.evaluation.fewshot.episodes import EpisodeResult
from vjepa_fast.evaluation.fewshot.prototype import prototype_episodes
from vjepa_fast.evaluation.fewshot.tuning.embedder import Embedder, embed
from vjepa_fast.evaluation.fewshot.tuning.parts import Part
from vjepa_fast.evaluation.fewshot.tuning.settings import TuneSettings
from vjepa_fast.models.vit import VisionTransformer


@dataclass
class TuneResult:
    """A tuned model and how it came about.

    ``losses``: mean per epoch, by stage. ``validation``: few-shot accuracy on the validation classes, by stage; of
    "meta" one per epoch. ``test``: EpisodeResult on the novel classes by stage and shots, all stages on the same
    episodes; "start" is the model as it was given, "meta" the answer. ``notes``: what was changed or is worth knowing.
    """

    method: str
    model: Embedder
    losses: dict[str, list[float]]
    validation: dict[str, list[float]]
    test: dict[str, dict[int, EpisodeResult]]
    best_epoch: int  # of the meta stage, from 1; 0: no meta stage
    temperature: float
    seed: int
    settings: TuneSettings
    notes: list[str] = field(default_factory=list)

    @property
    def encoder(self) -> VisionTransformer | None:
        """The tuned encoder (its ``state_dict()`` can be saved); None where frozen features were given."""
        return self.model.encoder

    def to_dict(self) -> dict:
        """Plain types, for JSON; without weights and per-episode values."""
        episode = ("mean", "ci95", "episodes", "way", "shot", "queries")
        return {
            "method": self.method,
            "losses": self.losses,
            "validation": self.validation,
            "test": {
                stage: {str(shot): {k: getattr(r, k) for k in episode} for shot, r in by_shot.items()}
                for stage, by_shot in self.test.items()
            },
            "best_epoch": self.best_epoch,
            "temperature": self.temperature,
            "seed": self.seed,
            "settings": asdict(self.settings),
            "notes": list(self.notes),
        }


def novel_episodes(
    model: Embedder, novel: Part, settings: TuneSettings, seed: int, device: torch.device
) -> dict[int, EpisodeResult]:
    """EpisodeResult by shots on the novel classes; the episodes depend on labels and ``seed`` alone."""
    features = embed(model, novel, settings.chunk, device)
    return {
        shot: prototype_episodes(features, settings.way, shot, settings.queries, settings.episodes, seed)
        for shot in settings.shots
    }
