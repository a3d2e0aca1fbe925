"""What a run refuses before its first batch: `check`, called by `Trainer` and by ``vjepa-fast config``."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from vjepa_fast import config as configs
from vjepa_fast.config.schema import Config
from vjepa_fast.data.decoders import choose_decoder
from vjepa_fast.data.loader import ClipLoader
from vjepa_fast.data.manifests.pipes import PREFIX
from vjepa_fast.errors import UserError
from vjepa_fast.layers.block import use_attention, use_epilogues
from vjepa_fast.models.predictor import Predictor
from vjepa_fast.models.vit import VisionTransformer
from vjepa_fast.objectives import ObjectivePlan
from vjepa_fast.trainer import (
    capacity,
    captured,
    levjepa,
    loggers,
    optim,
    passes,
    precision,
    sharding,
    starting,
    streams,
)
from vjepa_fast.trainer.building import build_models, build_samplers, reaches_target
from vjepa_fast.trainer.distributed import Distributed
from vjepa_fast.trainer.step import IMAGE_GROUPS, resolve_device


@dataclass(frozen=True)
class Checked:
    """The models of a run, on torch's meta device: shapes without memory. And what is captured.

    ``heads`` are the learnable parts of the loss; predictor and objectives are V-JEPA's alone.
    """

    encoder: VisionTransformer
    heads: nn.Module
    graphs: captured.Choice
    predictor: Predictor | None = None
    plan: ObjectivePlan | None = None


def check(cfg: Config) -> Checked:
    """Refuse a configuration that cannot be trained on this machine; reads no data and allocates no weights.

    Raises:
        ConfigError: names the key, its value, what is accepted and what to do.
    """
    configs.from_dict(configs.to_dict(cfg))
    sharding.check(cfg)
    world = Distributed.world_from_env()
    streams.shares(passes.micro_batches(cfg, world), 0, world)
    loggers.check(cfg)
    device = resolve_device(cfg.runtime.device, Distributed.local_rank_from_env())
    dtype = precision.resolve_dtype(cfg.runtime.dtype, device)
    if cfg.method == "levjepa":
        return _check_levjepa(cfg, device, dtype)
    with torch.device("meta"):
        encoder, predictor, plan = build_models(cfg)
    if cfg.runtime.fp8:
        precision.enable_fp8(device, dtype, encoder, predictor)
    use_attention(cfg.runtime.attention, device, dtype, encoder, predictor)
    use_epilogues(cfg.runtime.epilogues, device, dtype, encoder, predictor)
    quantum = capacity.quantum(cfg, device, dtype, encoder, predictor)
    for section, data in (("data", cfg.data), ("img_data", cfg.img_data)):
        if data is not None:
            choose_decoder(data.decoder, f"{section}.decoder")
    _check_masks(cfg)
    optim.check(cfg.optimization)
    graphs = captured.choose(cfg, device, quantum=quantum, target_grad=reaches_target(cfg, plan), plan=plan)
    return Checked(encoder, plan.heads, graphs, predictor, plan)


def _check_levjepa(cfg: Config, device: torch.device, dtype: torch.dtype) -> Checked:
    with torch.device("meta"):
        encoder, projector = levjepa.build_models(cfg)
    levjepa.prepare(cfg, device, dtype, encoder)
    choose_decoder(cfg.data.decoder, "data.decoder")
    optim.check(cfg.optimization)
    return Checked(encoder, projector, captured.Choice("off", ["the step of method: levjepa is not captured"]))


def _check_masks(cfg: Config) -> None:
    """Ask the strategies about every group of clips (by frames per clip) that a batch of a stream may hold."""
    samplers = build_samplers(cfg)
    for stream, data in enumerate((cfg.data, cfg.img_data)):
        if data is None:
            continue
        weights = data.datasets_weights or (1.0,) * max(1, len(data.datasets), len(data.dataset_fpcs))
        fpcs = data.dataset_fpcs * (len(weights) if len(data.dataset_fpcs) == 1 else 1)
        lengths = list(dict.fromkeys(frames for frames, weight in zip(fpcs, weights) if weight > 0))
        clips = data.batch_size if len(lengths) == 1 else None
        for i, frames in enumerate(lengths):
            image = bool(stream) or frames == 1
            sampler, last = samplers[image], min(i, data.batch_size - 1)
            grid = sampler.grid((1, 3, frames, data.crop_size, data.crop_size))
            sampler.check_group(grid, clips=None if frames == 1 else clips, group=last + IMAGE_GROUPS * image)


def check_data(cfg: Config) -> list[str]:
    """What there is to say of the datasets, and of the weights to start from, before a run, in lines; empty if nothing.

    Manifests are read, and so are the shapes of ``init.path``. A command that writes a shard (``pipe:``) is named and
    not run, which training does.
    """
    notes: list[str] = []
    for section, data in (("data", cfg.data), ("img_data", cfg.img_data)):
        if data is None:
            continue
        if commands := [entry for entry in data.datasets if entry.startswith(PREFIX)]:
            notes.append(f"{section}.datasets: train would run {' and '.join(commands)}; read it before you do")
            continue
        try:
            ClipLoader(cfg, img=section == "img_data").close()
        except UserError as error:
            notes.append(f"train would refuse the data: {error}")
    return notes + starting.describe(cfg)
