"""Masked pixels: the predictor's output, through a linear head, against the clip itself (MAE, arXiv:2111.06377; of
clips VideoMAE, arXiv:2203.12602, and MAE-ST, arXiv:2205.09113). The control of every latent objective: the same
encoder, masks and predictor, and no target encoder, whose forward pass is left out where no other term reads it.

y = the pixels of a predicted token, normalised as the encoder's input is, and with `norm` once more over the token, as
(y - mean) / sqrt(var + eps); mean over predicted tokens and pixels of (head(z_pred) - y)^2
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from vjepa_fast import ops
from vjepa_fast.layers.packed import Packed, Stream, ids
from vjepa_fast.objectives.api import Objective, TermContext, flag, linear, number, objective
from vjepa_fast.objectives.reduce import mean_of_entries, mean_of_tokens
from vjepa_fast.objectives.state import LatentState

CHANNELS = 3


@objective("pixels")
@dataclass(frozen=True)
class Pixels(Objective):
    """mean (head(z_pred) - y)^2, y = pixels of a predicted token, with `norm` as (y - mean) / sqrt(var + eps)."""

    access = "TOKEN"
    needs = frozenset({"z_pred", "clips", "masks_pred", "grids"})
    gradient_to = "z_pred, head"

    norm: bool = flag(True)
    eps: float = number(1e-6, above=0.0)

    def build_head(self, ctx: TermContext, generator: torch.Generator) -> nn.Module:
        return linear(ctx.dim, CHANNELS * ctx.tubelet * ctx.patch**2, generator)

    def value(self, state: LatentState, head: nn.Module | None, ctx: TermContext) -> Tensor:
        assert head is not None
        values: list[Tensor] = []
        for i, (outputs, masks) in enumerate(zip(state.z_pred, state.masks_pred)):
            for z, mask in zip(outputs, masks):
                if z.numel() == 0:
                    continue
                if isinstance(mask, Stream):  # 0 x NaN is no 0 in the gradient of the head
                    z = z.masked_fill(~mask.real[..., None], 0.0)
                guess = head(z)
                error = (guess - self.targets(state, i, mask, ctx.tubelet).to(guess.dtype)).square()
                values.append(mean_of_tokens(error.mean(-1), mask))
        return mean_of_entries([(v, None) for v in values], [*state.outputs("z_pred"), *head.parameters()])

    def targets(self, state: LatentState, i: int, mask: Tensor | Packed, tubelet: int) -> Tensor:
        """Pixels of the tokens of a mask of group ``i``, [B, K, P] (packed [1, M, P]), P = 3 * tubelet * patch^2.

        Ordered (channel, frame, row, column). A token of a single frame counts as that frame, ``tubelet`` times.
        """
        clip = state.clips[i].detach()
        steps, height, _ = state.grids[i]
        frames, patch = clip.shape[2] // steps, clip.shape[3] // height
        dtype = torch.promote_types(clip.dtype, torch.float32)
        y = ops.tubelet_patchify(clip, ids(mask), frames, patch, state.mean, state.std, dtype)
        if frames < tubelet:
            y = y.unflatten(-1, (CHANNELS, frames, -1)).repeat(1, 1, 1, tubelet // frames, 1).flatten(2)
        if self.norm:
            var, mean = torch.var_mean(y, dim=-1, keepdim=True)
            y = (y - mean) / (var + self.eps).sqrt()
        return y
