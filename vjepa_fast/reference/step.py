"""One whole training step as published: schedules, target, context per mask, predictor, losses, AdamW, EMA."""

from __future__ import annotations

import contextlib
import copy
from typing import Any

import torch
from torch.nn import functional as F

from vjepa_fast.reference import schedules
from vjepa_fast.reference.model import Encoder, Predictor
from vjepa_fast.reference.total import Losses

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def normalize_levels(h, levels: int):
    """Each level's channels through a LayerNorm without affine."""
    return torch.cat([F.layer_norm(part, (part.shape[-1],)) for part in h.chunk(levels, dim=-1)], dim=-1)


def parameter_groups(*modules):
    """Weights with decay, one group per module, then biases and one-dimensional parameters without."""

    def split(module, wanted):
        named = module.named_parameters()
        return [p for name, p in named if p.requires_grad and (("bias" in name) or p.dim() == 1) is wanted]

    decayed = [{"params": split(module, False)} for module in modules]
    plain = [{"params": split(module, True), "WD_exclude": True, "weight_decay": 0.0} for module in modules]
    return [group for group in decayed + plain if group["params"]]


class ReferenceStep:
    """Holds encoder, predictor, target encoder, losses (with heads), optimiser and schedules; call it once per step.

    ``dtype`` bfloat16 runs the forward pass under autocast and scales the loss, as published; ``disable_ema`` takes the
    online encoder, with gradient, as the target. ``mask_index`` None gives every mask its own token.
    """

    def __init__(
        self,
        encoder: Encoder,
        predictor: Predictor,
        losses: Losses,
        *,
        epochs=100,
        ipe=300,
        ipe_scale=1.0,
        lr=6e-4,
        start_lr=1e-4,
        final_lr=6e-4,
        warmup=1.0,
        weight_decay=0.04,
        final_weight_decay=0.04,
        ema=(0.99925, 0.99925),
        betas=(0.9, 0.999),
        eps=1e-8,
        dtype=torch.float32,
        disable_ema=False,
        mask_index: int | None = 0,
        mean=MEAN,
        std=STD,
    ):
        self.encoder, self.predictor, self.losses = encoder, predictor, losses
        self.target_encoder = copy.deepcopy(encoder).requires_grad_(False)
        self.epochs, self.ipe, self.ema = epochs, ipe, ema
        self.dtype, self.disable_ema, self.mask_index = dtype, disable_ema, mask_index
        self.mean, self.std = mean, std
        self.device = next(encoder.parameters()).device
        self.optimizer = torch.optim.AdamW(parameter_groups(encoder, predictor, losses), lr=lr, betas=betas, eps=eps)
        total = int(ipe_scale * epochs * ipe)
        self.lr_schedule = schedules.WarmupCosineLR(
            self.optimizer, warmup=int(warmup * ipe), start=start_lr, ref=lr, final=final_lr, total=total
        )
        self.wd_schedule = schedules.CosineWD(self.optimizer, ref=weight_decay, final=final_weight_decay, total=total)
        self.momentum_schedule = schedules.momentum(ema, ipe, epochs, ipe_scale)
        mixed = dtype != torch.float32
        self.scaler = torch.amp.GradScaler(self.device.type) if mixed else None
        self.step = 0

    def autocast(self):
        """The context that the forward pass runs in."""
        if self.dtype == torch.float32:
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, dtype=self.dtype)

    def normalize(self, clip):
        """uint8 clips to float; float ones are taken as normalised."""
        if clip.dtype != torch.uint8:
            return clip
        shape = (1, -1, 1, 1, 1)
        mean, std = (torch.tensor(x, device=clip.device).view(shape) for x in (self.mean, self.std))
        return (clip.float() / 255.0 - mean) / std

    def forward_target(self, clips):
        """``h [B,N,D]`` of each group, normalised per level."""
        encoder = self.encoder if self.disable_ema else self.target_encoder
        with torch.set_grad_enabled(self.disable_ema):
            return [normalize_levels(encoder(clip), encoder.levels) for clip in clips]

    def forward_context(self, clips, masks_enc, masks_pred):
        """``z [B,Ke,D]``, ``z_pred [B,Kp,D]`` and ``z_context [B,Ke,D]`` of each group and mask."""
        z, z_pred, z_context = [], [], []
        for clip, enc_i, pred_i in zip(clips, masks_enc, masks_pred):
            modality = "image" if self.encoder.is_image(clip) else "video"
            z_i = [self.encoder(clip, mask) for mask in enc_i]
            outputs = [
                self.predictor(z_ij, enc, pred, modality, j if self.mask_index is None else self.mask_index)
                for j, (z_ij, enc, pred) in enumerate(zip(z_i, enc_i, pred_i))
            ]
            z.append(z_i)
            z_pred.append([pred for pred, _ in outputs])
            z_context.append([context for _, context in outputs])
        return z, z_pred, z_context

    def forward(self, clips, masks_enc, masks_pred):
        """(total, values, coefficients) of the current step; nothing is updated."""
        clips = [self.normalize(clip) for clip in clips]
        with self.autocast():
            h = self.forward_target(clips)
            z, z_pred, z_context = self.forward_context(clips, masks_enc, masks_pred)
            return self.losses(
                grids=[self.encoder.grid(clip) for clip in clips],
                clips=clips,
                h=h,
                z=z,
                z_pred=z_pred,
                z_context=z_context,
                masks_enc=masks_enc,
                masks_pred=masks_pred,
                step=self.step,
                total_steps=self.epochs * self.ipe,
                epoch=self.step // self.ipe,
                epochs=self.epochs,
            )

    def __call__(self, clips, masks_enc, masks_pred) -> dict:
        """One step on ``clips`` (one per group) with nested masks; returns loss, terms, weights, lr, wd and ema."""
        lr, wd = self.lr_schedule.step(), self.wd_schedule.step()
        total, values, coefficients = self.forward(clips, masks_enc, masks_pred)
        if self.scaler is None:
            total.backward()
            self.optimizer.step()
        else:
            self.scaler.scale(total).backward()
            self.scaler.unscale_(self.optimizer)
            self.scaler.step(self.optimizer)
            self.scaler.update()
        self.optimizer.zero_grad()
        momentum = next(self.momentum_schedule)
        if not self.disable_ema:
            with torch.no_grad():
                target: list[torch.Tensor] = list(self.target_encoder.parameters())
                online: list[torch.Tensor] = list(self.encoder.parameters())
                # as published; pyright: torch has no public names for these
                torch._foreach_mul_(target, momentum)  # pyright: ignore[reportPrivateImportUsage]  # no public twin
                torch._foreach_add_(target, online, alpha=1 - momentum)  # pyright: ignore[reportPrivateImportUsage]  # no public twin
        self.step += 1
        return {
            "loss": float(total.detach()),
            "terms": {term: float(value.detach()) for term, value in values.items()},
            "weights": coefficients,
            "lr": lr,
            "wd": wd,
            "ema": momentum,
        }


def build_reference(
    *,
    crop_size=224,
    patch_size=16,
    num_frames=16,
    tubelet_size=2,
    embed_dim=768,
    depth=12,
    num_heads=12,
    levels=4,
    pred_embed_dim=256,
    pred_depth=8,
    pred_num_heads=8,
    num_mask_tokens=2,
    zero_init_mask_tokens=True,
    predict_all=True,
    interpolate_rope=True,
    rope_variant="v2.1",
    modality_embedding=True,
    img_temporal_dim_size=1,
    use_silu=False,
    pred_use_silu=False,
    wide_silu=True,
    use_activation_checkpointing=False,
    objectives=None,
    ld_grad=False,
    sigreg_seed=0,
    seed=0,
    device="cpu",
    **optimization,
) -> ReferenceStep:
    """The published step from plain values (defaults: ViT-B/16 at 16 x 224 x 224, as in all published recipes).

    Arguments up to ``use_activation_checkpointing`` are those of ``Encoder`` and ``Predictor`` (``pred_...``;
    ``predict_all`` is ``return_all_tokens``). ``objectives``: {term: {field: value}}, names and fields of
    ``vjepa_fast.objectives``; default: pred and context 0.5 with the published warm-up from step 15000 to 30000.
    ``ld_grad``: let LD train under hard weighting (the intended behaviour); as published it does not. ``sigreg_seed``:
    of SIGReg's directions; as published (0) they depend on the step alone. ``seed``: of the initial weights.
    ``optimization``: the keyword arguments of ``ReferenceStep``.
    """
    if objectives is None:
        objectives = {"pred": {}, "context": {"coeff": 0.5, "warmup": (15000, 30000)}}
    shared: dict[str, Any] = dict(
        crop_size=crop_size,
        patch_size=patch_size,
        tubelet_size=tubelet_size,
        levels=levels,
        interpolate_rope=interpolate_rope,
        rope_variant=rope_variant,
        modality_embedding=modality_embedding,
        img_temporal_dim_size=img_temporal_dim_size,
        wide_silu=wide_silu,
        use_activation_checkpointing=use_activation_checkpointing,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        encoder = Encoder(embed_dim=embed_dim, depth=depth, num_heads=num_heads, use_silu=use_silu, **shared)
        predictor = Predictor(
            num_frames=num_frames,
            embed_dim=embed_dim,
            predictor_embed_dim=pred_embed_dim,
            depth=pred_depth,
            num_heads=pred_num_heads,
            num_mask_tokens=num_mask_tokens,
            zero_init_mask_tokens=zero_init_mask_tokens,
            use_silu=pred_use_silu,
            return_all_tokens=predict_all,
            **shared,
        )
        losses = Losses(objectives, levels * embed_dim, ld_grad=ld_grad, sigreg_seed=sigreg_seed)
    return ReferenceStep(encoder.to(device), predictor.to(device), losses.to(device), **optimization)
