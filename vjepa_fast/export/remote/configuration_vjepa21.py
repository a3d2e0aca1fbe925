"""Configuration of `VJEPA21Model`. Written by vjepa_fast (MIT)."""

from __future__ import annotations

from typing import Any

from transformers import PretrainedConfig


class VJEPA21Config(PretrainedConfig):
    """Architecture of an encoder; the arguments are those of ``vjepa_fast.models.build_encoder``."""

    model_type = "vjepa21"
    attribute_map = {"hidden_size": "embed_dim", "num_hidden_layers": "depth", "num_attention_heads": "num_heads"}

    def __init__(
        self,
        embed_dim: int = 768,
        depth: int = 12,
        num_heads: int = 12,
        mlp_ratio: float = 4.0,
        img_size: int | list[int] = 224,
        patch_size: int = 16,
        num_frames: int = 16,
        tubelet_size: int = 2,
        levels: int = 4,
        use_rope: bool = True,
        interpolate_rope: bool = True,
        rope_variant: str = "v2.1",
        use_silu: bool = False,
        wide_silu: bool = True,
        uniform_power: bool = True,
        modality_embedding: bool = True,
        img_temporal_dim_size: int | None = 1,
        cls_token: bool = False,
        block_causal: bool = False,
        mean: list[float] | None = None,
        std: list[float] | None = None,
        **kwargs: Any,
    ):
        self.embed_dim, self.depth, self.num_heads, self.mlp_ratio = embed_dim, depth, num_heads, mlp_ratio
        self.img_size, self.patch_size = img_size, patch_size
        self.num_frames, self.tubelet_size = num_frames, tubelet_size
        self.levels = levels
        self.use_rope, self.interpolate_rope, self.rope_variant = use_rope, interpolate_rope, rope_variant
        self.use_silu, self.wide_silu, self.uniform_power = use_silu, wide_silu, uniform_power
        self.modality_embedding, self.img_temporal_dim_size = modality_embedding, img_temporal_dim_size
        self.cls_token, self.block_causal = cls_token, block_causal
        self.mean = [0.485, 0.456, 0.406] if mean is None else list(mean)
        self.std = [0.229, 0.224, 0.225] if std is None else list(std)
        super().__init__(**kwargs)
