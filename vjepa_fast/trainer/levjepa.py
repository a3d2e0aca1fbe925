"""One training step of LeVJEPA (arXiv:2608.27395): an encoder, views of a clip that are to agree, and SIGReg; no target
encoder in the objective, no predictor, no stop-gradient.

Shapes: B clips, V views of each (the global one first), F frames, K kept patch tokens of a view, E width of the class
token, C channels of an embedding.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from vjepa_fast import models
from vjepa_fast.config.schema import Config
from vjepa_fast.errors import ConfigError
from vjepa_fast.layers import attention
from vjepa_fast.layers.block import use_attention, use_epilogues
from vjepa_fast.metrics import flops, geometry
from vjepa_fast.metrics.profile import phase, whole_step
from vjepa_fast.models import interop
from vjepa_fast.models.levjepa import Projector, draw_kept
from vjepa_fast.models.vit import VisionTransformer
from vjepa_fast.objectives import levjepa as losses
from vjepa_fast.objectives.epps_pulley import draw
from vjepa_fast.trainer import nonfinite, optim, precision, regional
from vjepa_fast.trainer.distributed import Distributed, Gradients
from vjepa_fast.trainer.prefetch import Staged, to_device
from vjepa_fast.trainer.schedules import Schedules
from vjepa_fast.trainer.step import StepOutput

if TYPE_CHECKING:
    from vjepa_fast.data.loader import Batch

_DROPPED = 7  # what else is drawn for a sample has other numbers here


def build_models(cfg: Config) -> tuple[VisionTransformer, Projector]:
    """(encoder, projector) of a run, on torch's default device.

    Raises:
        ConfigError: sizes that cannot be used.
    """
    encoder, own = models.encoder_from_config(cfg), cfg.levjepa
    return encoder, Projector(encoder.embed_dim, own.proj_hidden, own.proj_dim)


def prepare(cfg: Config, device: torch.device, dtype: torch.dtype, encoder: VisionTransformer) -> None:
    """Let the encoder compute as ``runtime`` says.

    Raises:
        ConfigError: that is not supported, here or by this method.
    """
    run = cfg.runtime
    for key, hint in (("cuda_graphs", "auto or false"), ("compile", "blocks, auto or false")):
        value = getattr(run, key)
        if value in (True, "target"):
            asked = str(value).lower()
            raise ConfigError(f"runtime.{key}: {asked} is not supported under method: levjepa; use {hint}")
    if run.fp8:
        precision.enable_fp8(device, dtype, encoder)
    use_attention(run.attention, device, dtype, encoder)
    backend = attention.find(run.attention)
    if backend is not None and encoder.block_causal:
        head_dim = encoder.embed_dim // encoder.num_heads
        attention.require(backend, attention.Call(device, dtype, head_dim, grad=True, causal=True))
    use_epilogues(run.epilogues, device, dtype, encoder)


def average_momentum(index: int, cfg: Config) -> float | None:
    """Momentum of the update of the averaged weights that follows step ``index`` (from 0); None: there is none.

    Update k (from 0) has the lesser of ``levjepa.average`` and (1 + k) / (10 + k): the average reaches over the last
    tenth of the updates so far, however short the run, until the configured momentum reaches less far.
    """
    own = cfg.levjepa
    if (index + 1) % own.average_every:
        return None
    k = (index + 1) // own.average_every - 1
    return min(own.average, (1 + k) / (10 + k))


class LevjepaStep:
    """Holds the models and the optimiser of a run; a call makes one optimiser step.

    Args:
        cfg: the run's configuration.
        device: where.
        dtype: float32, or bfloat16 by autocast.
        world: the processes that train together. SIGReg is that of the clips of all of them, batch normalisation sees
            those of one; both see one micro-batch.

    Attributes: ``encoder``, ``projector``, ``target_encoder`` (the average of the encoder's weights, for evaluation
    only), ``optimizer``, ``schedules``. Initial weights depend on ``cfg.seed`` alone.
    """

    def __init__(
        self,
        cfg: Config,
        *,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        world: Distributed | None = None,
    ):
        self.cfg, self.device, self.dtype = cfg, torch.device(device), dtype
        self.world = world or Distributed()
        self.sharded = False
        self.schedules = Schedules.from_config(cfg)
        torch.manual_seed(cfg.seed)
        encoder, projector = build_models(cfg)
        self.encoder, self.projector = encoder.to(self.device), projector.to(self.device)
        prepare(cfg, self.device, dtype, self.encoder)
        self.target_encoder = copy.deepcopy(self.encoder).requires_grad_(False)
        modules = {"encoder": self.encoder, "heads": self.projector}
        self.optimizer = optim.build_optimizer(modules, cfg.optimization, self.device)
        self.params = optim.parameters(self.optimizer)
        self.average = optim.Average(self.encoder, self.target_encoder)
        self.gradients = Gradients(self.params, self.world)
        self.guard = nonfinite.Guard(cfg.optimization, self.world)
        self.draws_on = torch.device("cpu") if self.device.type == "meta" else self.device
        self.stack = flops.Stack.of(self.encoder.blocks)
        if regional.resolve(cfg, self.device) == "blocks":
            for block in self.encoder.blocks:
                block.compile(dynamic=True)

    @whole_step
    def __call__(
        self,
        batches: Batch | Staged | Sequence[Batch | Staged],
        index: int,
        *,
        stop: bool = False,
        monitor: bool = False,
    ) -> StepOutput:
        """One optimiser step over one or more micro-batches, whose losses are averaged; as `TrainStep`'s."""
        micro = list(batches) if isinstance(batches, Sequence) else [batches]
        lr, wd = self.schedules.lr(index), self.schedules.weight_decay(index)
        optim.set_schedule(self.optimizer, lr, wd)
        self.gradients.begin()
        rows: list[Tensor] = []
        work, monitors = flops.Work(), dict[str, Tensor]()
        for number, batch in enumerate(micro):
            last = number == len(micro) - 1
            cls, embeddings, done = self.forward(batch)
            work += done
            with phase("losses"):
                agree, spread = self.losses(embeddings, index)
                total = agree + self.cfg.levjepa.sigreg * spread
            if monitor and last:
                monitors = _monitors(cls, embeddings)
            del cls, embeddings
            with phase("backward"):
                self.gradients.backward(total / len(micro), last=last)
            rows.append(torch.stack((total, agree, spread)).detach())
        stop = self.gradients.finish(stop)
        due = average_momentum(index, self.cfg)
        average, momentum = (None, 1.0) if due is None else (self.average, due)
        with phase("optimiser"):
            norm = optim.gradient_norm(self.params)
        go = self.guard.go(rows, norm)
        optim.update(self.optimizer, average, momentum, norm, self.cfg.optimization.clip_grad, go=go)
        loss, agree, spread = torch.stack(rows).mean(0).unbind()
        groups = [g for b in micro for g in b.groups]
        return StepOutput(
            loss=loss,
            terms={"invariance": agree, "sigreg": spread},
            weights={"invariance": 1.0, "sigreg": self.cfg.levjepa.sigreg},
            grad_norm=norm,
            lr=lr,
            weight_decay=wd,
            momentum=momentum,
            clips=sum(len(g.paths) for g in groups) * self.world.world,
            paths=[p for g in groups for p in g.paths],
            stop=stop,
            work=work,
            monitors=monitors,
        )

    def losses(self, embeddings_VBC: Tensor, index: int) -> tuple[Tensor, Tensor]:
        """(invariance, SIGReg) of the embeddings at step ``index``, 0-d; the loss adds ``levjepa.sigreg`` times the
        second to the first.
        """
        own, seed = self.cfg.levjepa, self.cfg.seed
        normal = draw(own.proj_dim, own.num_slices, seed=seed, step=index, device=self.draws_on).to(self.device)
        together = self.world if self.world.world > 1 else None
        return losses.invariance(embeddings_VBC), losses.sigreg(embeddings_VBC, normal, own.knots, together)

    def forward(self, batch: Batch | Staged) -> tuple[Tensor, Tensor, flops.Work]:
        """Class tokens [V,B,E] and embeddings [V,B,C] (float32) of the views of a batch, and the work behind them."""
        (group,) = batch.groups
        assert group.local is not None, "the loader of method: levjepa gives local views"
        with phase("copy"):
            clip, local = to_device(group.clip, self.device), to_device(group.local, self.device)
        clips, views = local.shape[:2]
        seed = np.random.SeedSequence((self.cfg.seed, group.first_sample, _DROPPED)).generate_state(1, np.uint64)
        generator = torch.Generator(self.draws_on).manual_seed(int(seed[0]) >> 2)
        whole, of_whole = self._encode(clip, generator)
        parts, of_parts = self._encode(local.flatten(0, 1), generator)
        cls = torch.cat((whole[None], parts.unflatten(0, (clips, views)).transpose(0, 1)))
        with phase("predictor"), self.autocast():
            embeddings = self.projector(cls.flatten(0, 1)).unflatten(0, cls.shape[:2])
        projected = flops.Work(0, 6 * self.projector.products * clips * (1 + views))
        return cls, embeddings.to(torch.promote_types(embeddings.dtype, torch.float32)), of_whole + of_parts + projected

    def _encode(self, clips: Tensor, generator: torch.Generator) -> tuple[Tensor, flops.Work]:
        """Class tokens [n,E] of uint8 clips [n,3,F,S,S], most of whose patch tokens are left out."""
        tokens = math.prod(self.encoder.grid(clips.shape))
        with phase("masks"):
            idx = draw_kept(len(clips), tokens, self.cfg.levjepa.drop, generator)
            idx = None if idx is None else idx.to(self.device)
        with phase("context"), self.autocast():
            cls = self.encoder.summary(clips, idx)
        kept, patch = tokens if idx is None else idx.shape[1], self.encoder.patch_embed.proj.weight.numel()
        return cls, flops.of_views(self.stack, patch, len(clips), kept)

    def stage(self, batch: Batch, index: int) -> Staged:
        """The views on the device; nothing is waited for."""
        with phase("copy"):
            groups = [
                replace(g, clip=to_device(g.clip, self.device), local=to_device(g.local, self.device))
                for g in batch.groups
                if g.local is not None
            ]
        return Staged(groups, batch.step, [])

    def autocast(self) -> AbstractContextManager[object]:
        """The precision in which models run."""
        return precision.autocast(self.device, self.dtype)

    def state_dict(self) -> dict[str, Any]:
        """The checkpoint's ``encoder target_encoder heads opt``, and no ``predictor``."""
        return {
            "encoder": interop.to_fair(self.encoder.state_dict()),
            "predictor": {},
            "target_encoder": interop.to_fair(self.target_encoder.state_dict()),
            "heads": dict(self.projector.state_dict()),
            "opt": self.optimizer.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any], path: object = "checkpoint") -> None:
        """Take over what `state_dict` returned.

        Raises:
            CheckpointError: it belongs to another architecture or method.
        """
        for name in ("encoder", "target_encoder"):
            interop.load_weights(getattr(self, name), state[name], f"{path}: {name}")
        interop.load_weights(self.projector, state["heads"], f"{path}: projector")
        optim.load_state(self.optimizer, state["opt"], path)
        self.params = optim.parameters(self.optimizer)


def _monitors(cls_VBE: Tensor, embeddings_VBC: Tensor) -> dict[str, Tensor]:
    """Of the global views of a batch: effective rank, at most B, and spread over the clips; 1 and 0 where all are the
    same.
    """
    with torch.no_grad():
        cls, embeddings = cls_VBE[0].float(), embeddings_VBC[0].float()
        return {
            "cls_rankme": torch.as_tensor(geometry.rankme(cls - cls.mean(0))).float(),
            "feature_std": geometry.feature_std(cls),
            "embedding_rankme": torch.as_tensor(geometry.rankme(embeddings - embeddings.mean(0))).float(),
            "embedding_std": geometry.feature_std(embeddings),
        }
