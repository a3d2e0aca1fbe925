"""A V-JEPA 2.1 encoder for transformers: ``AutoModel.from_pretrained(folder, trust_remote_code=True)``.

Written by vjepa_fast (MIT). Needs torch and transformers; the encoder itself is in ``encoder_vjepa21.py``.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.utils.generic import ModelOutput

from .configuration_vjepa21 import VJEPA21Config
from .encoder_vjepa21 import VideoEncoder


@dataclass
class VJEPA21Output(ModelOutput):
    """What `VJEPA21Model` returns.

    Attributes:
        last_hidden_state: [B,N,E], the last level of the patch tokens.
        levels: [B,N,L*E], all levels side by side, the last one last.
        pooler_output: [B,E], the class token, where the encoder has one; else the mean of ``last_hidden_state``.
    """

    last_hidden_state: Tensor | None = None
    levels: Tensor | None = None
    pooler_output: Tensor | None = None


class VJEPA21Model(PreTrainedModel):
    """The encoder, with its tensors under FAIR's names."""

    config_class = VJEPA21Config
    main_input_name = "pixel_values_videos"
    base_model_prefix = "vjepa21"
    _no_split_modules = ["Block"]

    def __init__(self, config: VJEPA21Config):
        super().__init__(config)
        self.encoder = VideoEncoder(config)
        self.post_init()

    def forward(
        self, pixel_values_videos: Tensor, context_ids: Tensor | None = None, return_dict: bool | None = None
    ) -> VJEPA21Output | tuple[Tensor, ...]:
        """Encode clips.

        Args:
            pixel_values_videos: [B,F,3,height,width], normalised with ``config.mean`` and ``config.std``. As many
                frames as ``config.img_temporal_dim_size`` are an image.
            context_ids: int64 [B,K], the tokens (t*H + h)*W + w to look at; None: all.
            return_dict: False: a tuple.
        """
        clip = pixel_values_videos.transpose(1, 2).to(self.encoder.patch_embed.proj.weight.dtype)
        levels, pooled = self.encoder(clip, context_ids), None
        if self.config.cls_token:
            pooled, levels = levels[-1][:, 0], [level[:, 1:] for level in levels]
        last = levels[-1]
        pooled = last.mean(1) if pooled is None else pooled
        found = VJEPA21Output(last, torch.cat(levels, -1), pooled)
        return found.to_tuple() if return_dict is False else found
