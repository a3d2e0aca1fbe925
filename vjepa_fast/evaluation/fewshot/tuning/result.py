"""A tuned model and how it came about."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field

from vjepa_fast.evaluation.fewshot.episodes import EpisodeResult
from vjepa_fast.evaluation.fewshot.tuning.embedder import Embedder
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
    seed: int
    settings: TuneSettings
    notes: list[str]
    losses: dict[str, list[float]] = field(default_factory=dict)
    validation: dict[str, list[float]] = field(default_factory=dict)
    test: dict[str, dict[int, EpisodeResult]] = field(default_factory=dict)
    best_epoch: int = 0  # of the meta stage, from 1; 0: no meta stage
    temperature: float = 0.0

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
