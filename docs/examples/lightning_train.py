"""V-JEPA as a LightningModule.

python docs/examples/lightning_train.py RECIPE [section.key=value ...]
"""

from __future__ import annotations

import sys
from pathlib import Path

import lightning
import torch
from torch.utils.data import DataLoader, IterableDataset

sys.path.insert(0, str(Path(__file__).parent))
from jepa import Jepa, clips

from vjepa_fast import config
from vjepa_fast.trainer.optim import set_schedule


class Clips(IterableDataset):
    """Batches of clips, each process its own share."""

    def __init__(self, cfg: config.Config, trainer: lightning.Trainer):
        self.cfg, self.trainer = cfg, trainer

    def __iter__(self):
        return clips(self.cfg, self.trainer.global_rank, self.trainer.world_size)


class LightningJepa(lightning.LightningModule):
    """The step, the schedules and the moving average; Lightning has the loop, devices, precision and checkpoints."""

    def __init__(self, cfg: config.Config):
        super().__init__()
        self.cfg, self.model = cfg, Jepa(cfg)
        self.losses: list[float] = []

    def configure_optimizers(self):
        """AdamW, whose numbers `on_train_batch_start` sets."""
        o = self.cfg.optimization
        return torch.optim.AdamW(self.model.parameter_groups(), lr=o.lr, betas=o.betas, eps=o.eps)

    def on_train_batch_start(self, batch, batch_idx):
        """Learning rate and weight decay are functions of the step."""
        schedules, step = self.model.schedules, self.global_step
        optimizer = self.optimizers(use_pl_optimizer=False)
        assert isinstance(optimizer, torch.optim.Optimizer)
        set_schedule(optimizer, schedules.lr(step), schedules.weight_decay(step))

    def training_step(self, batch, batch_idx):
        """The loss of a batch."""
        clip, step, first_sample = batch
        loss = self.model(clip, step, first_sample)
        self.log("loss", loss, prog_bar=True)
        self.losses.append(loss.item())
        return loss

    def on_train_batch_end(self, outputs, batch, batch_idx):
        """The target follows the encoder."""
        self.model.follow(self.global_step - 1)


def train(cfg: config.Config, **trainer_settings) -> LightningJepa:
    """Train as ``cfg`` says; a checkpoint of Lightning's, which ``load_encoder`` reads, goes to its folder."""
    module = LightningJepa(cfg)
    trainer = lightning.Trainer(
        max_steps=module.model.schedules.total_steps,
        gradient_clip_val=cfg.optimization.clip_grad,
        default_root_dir=cfg.folder,
        **trainer_settings,
    )
    trainer.fit(module, DataLoader(Clips(cfg, trainer), batch_size=None))
    trainer.save_checkpoint(Path(cfg.folder) / "lightning.ckpt")
    return module


if __name__ == "__main__":
    # images have an embedding of their own, which a step on videos leaves unused
    train(config.load(sys.argv[1], sys.argv[2:]), strategy="ddp_find_unused_parameters_true")
