"""The ways to make a training step: ours as the trainer makes it, and the published algorithm written plainly."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor

from vjepa_fast.bench.memory import free
from vjepa_fast.config import Config
from vjepa_fast.data.loader import Batch, ClipGroup
from vjepa_fast.errors import ConfigError
from vjepa_fast.metrics import flops
from vjepa_fast.reference import ReferenceStep, build_reference
from vjepa_fast.trainer import prefetch
from vjepa_fast.trainer.building import objective_fields
from vjepa_fast.trainer.precision import resolve_dtype
from vjepa_fast.trainer.step import TrainStep, resolve_device

# Keys of the configuration that the reference takes under the same names.
_MODEL_KEYS = (
    "levels",
    "pred_embed_dim",
    "pred_depth",
    "pred_num_heads",
    "predict_all",
    "interpolate_rope",
    "rope_variant",
    "modality_embedding",
    "img_temporal_dim_size",
    "use_silu",
    "pred_use_silu",
    "wide_silu",
)
_OPTIMIZATION_KEYS = (
    "epochs",
    "ipe",
    "ipe_scale",
    "lr",
    "start_lr",
    "final_lr",
    "warmup",
    "weight_decay",
    "final_weight_decay",
    "betas",
    "eps",
)


class Work(NamedTuple):
    """Of a step: the shapes of its masks, and the floating point operations that the model requires."""

    shapes: tuple[tuple[int, ...], ...]
    flops: float


class Provider:
    """One way to make the step of ``cfg``: ``prepare`` is not timed, ``step`` and ``steps`` are.

    ``name`` is one of ``cases.PROVIDERS``.
    """

    def __init__(self, name: str, cfg: Config):
        if cfg.runtime.threads:
            torch.set_num_threads(cfg.runtime.threads)
        self.name, self.cfg = name, cfg
        self.device = resolve_device(cfg.runtime.device)
        if name == "vjepa_fast_compiled":
            cfg = dataclasses.replace(cfg, runtime=dataclasses.replace(cfg.runtime, compile="blocks"))
        ours = TrainStep(cfg, device=self.device, dtype=resolve_dtype(cfg.runtime.dtype, self.device))
        self.dtype, self.dims, self.sampler = ours.dtype, ours.dims, ours.sampler
        self.counted = {"predict_context": ours.wants_context, "target_grad": ours.target_grad}
        self.ours: TrainStep | None = None
        self.theirs: ReferenceStep | None = None
        if not name.startswith("reference"):
            self.ours = ours
            return
        self.theirs = reference_of(cfg, ours, checkpointing=name == "reference_checkpointed")
        del ours
        free()  # it holds itself in a cycle, and must not count as the reference's memory
        if name == "reference_compiled":
            for module in (self.theirs.encoder, self.theirs.predictor, self.theirs.target_encoder):
                module.compile(dynamic=True)

    def prepare(self, index: int) -> Any:
        """The step's batch: for ours as the loader yields it, in memory that the device can read.

        The reference gets clips on the device, and the masks that ours draws inside its step.
        """
        batch = random_batch(self.cfg, index)
        if self.theirs is None:
            if self.device.type != "cuda":
                return batch
            return dataclasses.replace(
                batch, groups=[dataclasses.replace(group, clip=group.clip.pin_memory()) for group in batch.groups]
            )
        clips = [group.clip.to(self.device) for group in batch.groups]
        drawn = [
            self.sampler(clip, step=index, first_sample=group.first_sample, group=n)
            for n, (clip, group) in enumerate(zip(clips, batch.groups))
        ]
        return clips, [enc for enc, _ in drawn], [pred for _, pred in drawn]

    @property
    def replays(self) -> int | None:
        """Steps so far that were replays of a captured graph; None where none is used."""
        captured = None if self.ours is None else self.ours.captured
        return None if captured is None or captured.graphs.off else captured.graphs.replays

    def step(self, prepared: Any, index: int) -> Tensor:
        """Make the step; returns its loss, a tensor that was not waited for where the step itself does not."""
        if self.ours is not None:
            return self.ours(prepared, index).loss
        assert self.theirs is not None
        return self.theirs(*prepared)["loss"]

    def steps(
        self,
        prepared: Sequence[Any],
        indices: Sequence[int],
        mark: Callable[[int], AbstractContextManager] | None = None,
    ) -> Tensor:
        """Make the steps ``indices`` and return the last loss; ours as the trainer makes them, the next batch on its
        way while the device works. ``mark(i)``: a context for all that is done from the i-th step on to the next.
        """
        feed = None
        if self.ours is not None:
            feed = prefetch.Prefetcher([iter(prepared)], self.ours.stage, self.device)
        loss = torch.empty(0)
        for i, batch in enumerate(prepared):
            with mark(i) if mark is not None else nullcontext():
                if feed is not None:
                    batch = feed.take(indices[i])[0]
                loss = self.step(batch, indices[i])
                if feed is not None and i + 1 < len(prepared):
                    feed.advance(indices[i + 1])
        return loss

    def work(self, prepared: Any) -> Work:
        """What a step on ``prepared`` has to do, whoever computes it."""
        if self.theirs is None:
            masks = [
                self.sampler(g.clip, step=prepared.step, first_sample=g.first_sample, group=n)
                for n, g in enumerate(prepared.groups)
            ]
            clips, masks_enc, masks_pred = [g.clip for g in prepared.groups], *zip(*masks)
        else:
            clips, masks_enc, masks_pred = prepared
        groups = [
            c
            for clip, enc, pred in zip(clips, masks_enc, masks_pred)
            for c in flops.clips_of(self.sampler.grid(clip.shape), enc, pred)
        ]
        shapes = tuple(tuple(m.shape) for enc, pred in zip(masks_enc, masks_pred) for m in (*enc, *pred))
        return Work(shapes, sum(c.flops for c in flops.step_cost(self.dims, groups, **self.counted).values()))


def random_batch(cfg: Config, index: int) -> Batch:
    """Noise with the shapes of a batch, a function of the index alone."""
    data, groups = cfg.data, []
    lengths = list(dict.fromkeys(data.dataset_fpcs))
    for n, frames in enumerate(lengths):
        size = max(1, data.batch_size // len(lengths))
        gen = torch.Generator().manual_seed(1000 * index + n)
        shape = (size, 3, frames, data.crop_size, data.crop_size)
        clip = torch.randint(0, 256, shape, dtype=torch.uint8, generator=gen)
        zeros = torch.zeros(size, dtype=torch.int64)
        first = index * data.batch_size + n * size
        groups.append(ClipGroup(clip, zeros, zeros, ["noise"] * size, frames, "video", first))
    return Batch(groups, index)


def reference_of(
    cfg: Config, ours: TrainStep, *, dtype: torch.dtype | None = None, checkpointing: bool | None = None
) -> ReferenceStep:
    """The reference's step with the weights of ``ours``. ``dtype``, ``checkpointing``: in place of those of ``cfg``.

    Raises:
        ConfigError: the reference has no such masks.
    """
    if cfg.masks.truncate == "none":
        raise ConfigError(
            "masks.truncate: the reference takes masks of one length only, not none; "
            "use batch or random, or --providers vjepa_fast"
        )
    m, d = cfg.model, cfg.data
    options: dict[str, Any] = {
        **{name: getattr(m, name) for name in _MODEL_KEYS},
        **{name: getattr(cfg.optimization, name) for name in _OPTIMIZATION_KEYS},
        "crop_size": d.crop_size,
        "patch_size": d.patch_size,
        "num_frames": max(d.dataset_fpcs),
        "tubelet_size": d.tubelet_size,
        "embed_dim": ours.encoder.embed_dim,
        "depth": len(ours.encoder.blocks),
        "num_heads": ours.encoder.num_heads,
        "num_mask_tokens": ours.predictor.num_mask_tokens,
        "mask_index": 0 if ours.shared_token else None,
        "use_activation_checkpointing": m.use_activation_checkpointing if checkpointing is None else checkpointing,
        "objectives": objective_fields(cfg),
        "ld_grad": cfg.compat == "intended",
        "seed": cfg.seed,
        "device": ours.device,
        "dtype": dtype or ours.dtype,
        "ema": cfg.target.ema,
        "disable_ema": ours.online,
    }
    step = build_reference(**options)
    step.encoder.load_state_dict(ours.encoder.state_dict())
    step.target_encoder.load_state_dict(ours.encoder.state_dict())
    step.predictor.load_state_dict(ours.predictor.state_dict())
    step.losses.load_state_dict(ours.plan.state_dict())
    return step
