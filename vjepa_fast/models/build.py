"""Models from a configuration."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from vjepa_fast.models.predictor import Predictor, build_predictor
from vjepa_fast.models.vit import VisionTransformer, build_encoder

if TYPE_CHECKING:
    from vjepa_fast.config.schema import Config


def encoder_arguments(cfg: Config) -> dict[str, Any]:
    """What ``build_encoder`` gets for a configuration: of ``data``, ``data_aug``, ``model`` and its method."""
    data, model = cfg.data, cfg.model
    return {
        "name": model.model_name,
        "img_size": data.crop_size,
        "patch_size": data.patch_size,
        "num_frames": max(data.dataset_fpcs),
        "tubelet_size": data.tubelet_size,
        "embed_dim": model.embed_dim,
        "depth": model.depth,
        "num_heads": model.num_heads,
        "levels": model.levels,
        "use_rope": model.use_rope,
        "interpolate_rope": model.interpolate_rope,
        "rope_variant": model.rope_variant,
        "use_silu": model.use_silu,
        "wide_silu": model.wide_silu,
        "uniform_power": model.uniform_power,
        "modality_embedding": model.modality_embedding,
        "img_temporal_dim_size": model.img_temporal_dim_size,
        "mean": cfg.data_aug.mean,
        "std": cfg.data_aug.std,
        "init": model.init,
        "use_activation_checkpointing": model.use_activation_checkpointing,
        "cls_token": cfg.method == "levjepa",
        "block_causal": cfg.method == "levjepa" and cfg.levjepa.attention == "block_causal",
    }


def encoder_from_config(cfg: Config, device=None) -> VisionTransformer:
    """The encoder of a configuration, with fresh weights."""
    return build_encoder(**encoder_arguments(cfg), device=device)


def build_from_config(cfg: Config, device=None) -> tuple[VisionTransformer, Predictor]:
    """(encoder, predictor) of a configuration, with fresh weights from the global torch generator.

    Without ``model.num_mask_tokens`` the predictor has one mask token per mask, of whichever of ``masks`` and
    ``img_masks`` is longer.
    """
    encoder = encoder_from_config(cfg, device)
    model = cfg.model
    tokens = model.num_mask_tokens
    if tokens is None:
        tokens = max(len(masks.specs) for masks in (cfg.masks, cfg.img_masks) if masks is not None)
    predictor = build_predictor(
        encoder,
        embed_dim=model.pred_embed_dim,
        depth=model.pred_depth,
        num_heads=model.pred_num_heads,
        num_mask_tokens=tokens,
        return_all_tokens=model.predict_all,
        zero_init_mask_tokens=model.zero_init_mask_tokens,
        init=model.pred_init,
        use_silu=model.pred_use_silu,
        wide_silu=model.wide_silu,
        normalize=model.normalize_predictor,
        use_activation_checkpointing=model.use_activation_checkpointing,
        device=device,
    )
    return encoder, predictor
