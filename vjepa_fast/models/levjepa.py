"""What LeVJEPA (arXiv:2608.27395) has beside the encoder: the projector of its class token, and the tokens left out."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Projector(nn.Module):
    """Hidden layer, batch normalisation, GELU, and a linear layer; the evaluation does not use it.

    Batches are always normalised by their own statistics: no running ones are kept, as nothing reads the projector
    after training. Weights are initialised as PyTorch's linear layers.

    Args:
        inputs: channels of the class token.
        hidden: of the hidden layer.
        outputs: channels of an embedding.
    """

    def __init__(self, inputs: int, hidden: int, outputs: int):
        super().__init__()
        self.fc1 = nn.Linear(inputs, hidden)
        self.norm = nn.BatchNorm1d(hidden, track_running_stats=False)
        self.fc2 = nn.Linear(hidden, outputs)

    def forward(self, x_NE: Tensor) -> Tensor:
        """[N,E] -> [N,outputs], N at least 2."""
        return self.fc2(nn.functional.gelu(self.norm(self.fc1(x_NE))))

    @property
    def products(self) -> int:
        """Multiply-adds of one row."""
        return self.fc1.weight.numel() + self.fc2.weight.numel()


def kept_tokens(tokens: int, drop: float) -> int:
    """How many of a view's patch tokens are kept in training, at least 1."""
    return max(1, round(tokens * (1 - drop)))


def draw_kept(views: int, tokens: int, drop: float, generator: torch.Generator) -> Tensor | None:
    """Ids int64 [views, K], ascending, of the tokens kept of each view: K of all, uniformly at random; None: all.

    On the generator's device, which is not waited for.
    """
    kept = kept_tokens(tokens, drop)
    if kept == tokens:
        return None
    order = torch.rand(views, tokens, generator=generator, device=generator.device).argsort(1)
    return order[:, :kept].sort(1).values
