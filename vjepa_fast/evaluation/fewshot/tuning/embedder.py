"""The model of features that is tuned, what of it is trained, and what comes of it.

Shapes: B batch, F frames, S pixels, N tokens of grid (T, H, W), D token width, d feature width.
"""

from __future__ import annotations

import copy
import math
from dataclasses import asdict, dataclass, field, replace

import numpy as np
import torch
from torch import Tensor, nn

from vjepa_fast.errors import ConfigError, DataError
from vjepa_fast.evaluation.extract.features import Features, amp, encode, pool_tokens
from vjepa_fast.evaluation.fewshot.episodes import EpisodeResult
from vjepa_fast.evaluation.fewshot.tuning.metric import COSINE, Metric
from vjepa_fast.evaluation.fewshot.tuning.parts import Part
from vjepa_fast.evaluation.fewshot.tuning.settings import Setup, TuneSettings, parse_trunk
from vjepa_fast.models.vit import VisionTransformer


class Embedder(nn.Module):
    """The features that prototypes are made of: encoder, projection and pooling.

    ``per_token``: the projection acts on tokens ``[B, N, D]``, not on pooled features ``[B, d]``. Called with features
    ``[B, d]`` instead of clips it leaves the encoder out.
    """

    def __init__(
        self,
        encoder: VisionTransformer | None = None,
        projection: nn.Module | None = None,
        pooling: str = "time",
        level: str = "last",
        per_token: bool = False,
    ):
        super().__init__()
        self.encoder, self.projection = encoder, projection
        self.pooling, self.level, self.per_token = pooling, level, per_token

    def tokens(self, clips: Tensor) -> tuple[Tensor, tuple[int, int, int]]:
        """Tokens float32 ``[B, N, D]`` and their grid, of clips uint8 ``[B, 3, F, S, S]``."""
        if self.encoder is None:
            raise ValueError("this model has no encoder: it takes features [B, d]")
        z, grid = encode(self.encoder, clips, level=self.level)
        z = z.float()
        return (self.projection(z) if self.per_token and self.projection is not None else z), grid

    def pooled(self, z: Tensor, grid: tuple[int, int, int]) -> Tensor:
        """Features ``[B, d]`` of tokens."""
        x = pool_tokens(z, grid, self.pooling)
        return x if self.per_token or self.projection is None else self.projection(x)

    def forward(self, x: Tensor) -> Tensor:
        """Features ``[B, d]`` of clips or of features."""
        if x.dim() == 2:
            return x if self.projection is None else self.projection(x)
        return self.pooled(*self.tokens(x))


def identity_projection(width: int) -> nn.Linear:
    """A linear layer of ``width`` that changes nothing yet."""
    layer = nn.Linear(width, width)
    with torch.no_grad():
        layer.weight.copy_(torch.eye(width))
        layer.bias.zero_()
    return layer


def build_embedder(
    encoder: VisionTransformer | None,
    base: Part,
    settings: TuneSettings,
    device: torch.device,
    *,
    per_token: bool = False,
) -> Embedder:
    """A copy of ``encoder`` (the caller's stays as it is) in an Embedder, with gradients for ``settings.trunk`` alone.

    ConfigError: more last blocks than there are, or a trunk of an encoder where features were given.
    """
    trunk = parse_trunk(settings.trunk)
    if base.features:
        if encoder is not None and trunk != "head":
            raise ConfigError(f"trunk: {trunk!r} cannot be trained on frozen features; use head, or give clips")
        return Embedder(None, identity_projection(base.fetch(np.array([0])).shape[1])).to(device)
    if encoder is None:
        raise DataError(f"{base.role} part {base.name}: clips need an encoder; without one give Features")
    encoder = copy.deepcopy(encoder).to(device).float().eval().requires_grad_(trunk == "all")
    if hasattr(encoder, "pos_embed"):
        encoder.pos_embed.requires_grad_(False)  # fixed sine-cosine positions
    model = Embedder(encoder, None, settings.pooling, settings.level, per_token)
    if trunk == "head":
        with torch.no_grad():
            z, grid = model.tokens(base.fetch(np.array([0])).to(device))
            width = z.shape[-1] if per_token else model.pooled(z, grid).shape[-1]
        model.projection = identity_projection(width)
    elif isinstance(trunk, int):
        blocks = getattr(encoder, "blocks", ())
        if trunk > len(blocks):
            raise ConfigError(f"trunk: last {trunk} blocks of an encoder with {len(blocks)}")
        norms = encoder.norms_block if settings.level == "all" else encoder.norms_block[-1:]
        for module in (*blocks[-trunk:], *norms):
            module.requires_grad_(True)
    return model.to(device)


def trained(model: nn.Module) -> list[nn.Parameter]:
    """The parameters of ``model`` with gradients."""
    return [p for p in model.parameters() if p.requires_grad]


def new_head(width: int, classes: int, seed: int, device: torch.device) -> nn.Linear:
    """A linear classifier whose weights ``seed`` draws; the caller's random state is left alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.Linear(width, classes).to(device)


@torch.no_grad()
def embed(model: Embedder, part: Part, setup: Setup, metric: Metric = COSINE) -> Features:
    """What ``metric`` compares of all samples of a part, in order. DataError where it is not finite."""
    rows = []
    for index in np.array_split(np.arange(len(part.labels)), max(1, math.ceil(len(part.labels) / setup.chunk))):
        with amp(setup.device):
            rows.append(metric.represent(model, part.fetch(index).to(setup.device)).float().cpu())
    features = Features(torch.cat(rows).numpy(), part.labels, f"{part.role} part {part.name}")
    features.check_finite()
    return replace(features, name=part.name)


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
    metric: Metric = field(default=COSINE, repr=False)  # of all stages' episodes

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
