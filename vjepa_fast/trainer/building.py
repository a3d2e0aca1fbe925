"""What a run is made of, from its configuration: models, objectives, mask samplers; on torch's default device."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from vjepa_fast import masks, models, objectives
from vjepa_fast.config.schema import Config, DataConfig, MasksConfig
from vjepa_fast.errors import ConfigError
from vjepa_fast.models.vit import VisionTransformer

if TYPE_CHECKING:
    from vjepa_fast.models.predictor import Predictor


def objective_fields(cfg: Config) -> dict[str, dict[str, Any]]:
    """``cfg.objectives`` with ``cfg.loss.context_warmup`` put into its term, where both are present."""
    fields = {name: dict(values or {}) for name, values in cfg.objectives.items()}
    if cfg.loss.context_warmup is not None and "context" in fields:
        fields["context"]["warmup"] = list(cfg.loss.context_warmup)
    return fields


def build_models(cfg: Config) -> tuple[VisionTransformer, Predictor, objectives.ObjectivePlan]:
    """(encoder, predictor, objectives) of a run, on torch's default device.

    Raises:
        ConfigError: sizes, terms or fields that cannot be used; a term that reads what this model does not compute.
    """
    encoder, predictor = models.build_from_config(cfg)
    plan = objectives.build_objectives(
        objective_fields(cfg),
        levels=encoder.levels,
        embed_dim=encoder.embed_dim,
        compat=cfg.compat,
        target_grad=cfg.target.mode == "online",
        stop_gradient=cfg.target.stop_gradient,
        seed=cfg.seed,
        tubelet_size=cfg.data.tubelet_size,
        patch_size=cfg.data.patch_size,
    )
    for name, term in plan.terms.items():
        if "z_context" in term.needs and not cfg.model.predict_all:
            raise ConfigError(f"objectives.{name}: needs predicted context tokens; set model.predict_all=true")
    return encoder, predictor, plan


def reaches_target(cfg: Config, plan: objectives.ObjectivePlan) -> bool:
    """Whether the target takes part in the backward pass: an online one does if some term lets its gradient through."""
    refusals = (term.refusal(plan.ctx, False) for term in plan.terms.values())
    return cfg.target.mode == "online" and "h" in plan.needs and (not plan.stop_gradient or any(refusals))


def build_samplers(cfg: Config) -> tuple[masks.MaskStrategy, masks.MaskStrategy]:
    """Mask samplers (`masks.STRATEGIES`) for video and for images (the same masks unless ``img_masks`` is given)."""

    def build(masks_cfg: MasksConfig, data: DataConfig, section: str) -> masks.MaskStrategy:
        return masks.STRATEGIES.get_named(masks_cfg.strategy, f"{section}.strategy")(
            masks_cfg,
            crop_size=data.crop_size,
            patch_size=data.patch_size,
            tubelet_size=data.tubelet_size,
            seed=cfg.seed,
            mean=cfg.data_aug.mean,
            std=cfg.data_aug.std,
            compat=cfg.compat,
            section=section,
        )

    video = build(cfg.masks, cfg.data, "masks")
    if cfg.img_data is None and cfg.img_masks is None:
        return video, video
    section = "masks" if cfg.img_masks is None else "img_masks"
    return video, build(cfg.img_masks or cfg.masks, cfg.img_data or cfg.data, section)
