"""The parts of vjepa_fast as one module, for training loops of other libraries: see the two scripts beside it.

Shapes: B clips of F frames, N tokens, Ke and Kp kept context and predicted tokens of a mask, D = levels * embed_dim.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from vjepa_fast import config, masks, models
from vjepa_fast.data import ClipLoader
from vjepa_fast.objectives import LatentState, build_objectives
from vjepa_fast.trainer.optim import Average, parameter_groups
from vjepa_fast.trainer.schedules import Schedules


class Jepa(nn.Module):
    """Encoder, predictor, target encoder, objectives and masks of a recipe (V-JEPA, arXiv:2404.08471, section 3).

    ``forward`` gives the loss of a batch; ``parameter_groups`` is for the optimizer, ``follow`` comes after its step.
    """

    def __init__(self, cfg: config.Config):
        super().__init__()
        self.cfg, self.schedules = cfg, Schedules.from_config(cfg)
        torch.manual_seed(cfg.seed)
        self.encoder, self.predictor = models.build_from_config(cfg)
        encoder = self.encoder
        self.plan = build_objectives(
            cfg.objectives, levels=encoder.levels, embed_dim=encoder.embed_dim, compat=cfg.compat, seed=cfg.seed
        )
        self.target_encoder = copy.deepcopy(encoder).requires_grad_(False)
        self.average = Average(self.encoder, self.target_encoder)
        self.sampler = masks.STRATEGIES[cfg.masks.strategy](
            cfg.masks,
            crop_size=cfg.data.crop_size,
            patch_size=cfg.data.patch_size,
            tubelet_size=cfg.data.tubelet_size,
            seed=cfg.seed,
            mean=cfg.data_aug.mean,
            std=cfg.data_aug.std,
            compat=cfg.compat,
        )

    def forward(self, clip: Tensor, step: int, first_sample: int) -> Tensor:
        """The loss of uint8 clips [B,3,F,height,width], whose samples have the numbers ``first_sample`` and up."""
        enc, pred = self.sampler(clip, step=step, first_sample=first_sample)  # int64 [B,Ke], [B,Kp] per mask
        context = "z_context" in self.plan.needs
        with torch.no_grad():
            h = self.target_encoder(clip)  # [B,N,D]
        z = self.encoder(clip, masks=enc)
        numbers = list(range(len(enc)))
        grid = self.encoder.grid(clip.shape)
        z_pred, z_context = self.predictor(z, enc, pred, numbers, "video", grid=grid, context=context)
        state = LatentState(
            grids=[grid],
            clips=[clip],
            h=[h],
            h_normalized=False,  # the losses normalise it as they read it
            z=[z],
            z_pred=[z_pred],
            masks_enc=[[*enc]],
            masks_pred=[[*pred]],
            step=step,
            total_steps=self.schedules.total_steps,
            epoch=self.schedules.epoch(step),
            epochs=self.schedules.epochs,
        )
        if context:
            state.z_context = [z_context]
        return self.plan(state).total

    def parameter_groups(self) -> list[dict]:
        """Encoder, predictor and heads of the loss; biases and norms without weight decay."""
        modules = {"encoder": self.encoder, "predictor": self.predictor, "heads": self.plan}
        return parameter_groups(modules, self.cfg.optimization.weight_decay)

    def follow(self, step: int) -> None:
        """Let the target follow the encoder after an optimizer step."""
        self.average.follow(self.schedules.momentum(step))


def clips(cfg: config.Config, rank: int = 0, world: int = 1) -> Iterator[tuple[Tensor, int, int]]:
    """(clips uint8 [B,3,F,height,width], step, number of the first sample) without an end, for one of ``world``."""
    for batch in ClipLoader(cfg, rank=rank, world=world):
        group = batch.groups[0]
        yield group.clip, batch.step, group.first_sample
