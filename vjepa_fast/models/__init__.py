"""Encoder, predictor, the target's copy in low precision and weight files (see docs/models.md)."""

from vjepa_fast.models.build import build_from_config, encoder_from_config
from vjepa_fast.models.ema import LowCopy
from vjepa_fast.models.interop import from_fair, load_encoder, load_weights, to_fair
from vjepa_fast.models.names import to_hf
from vjepa_fast.models.predictor import build_predictor
from vjepa_fast.models.rollout import attention_rollout
from vjepa_fast.models.vit import SIZES, build_encoder

__all__ = [
    "LowCopy",
    "SIZES",
    "attention_rollout",
    "build_encoder",
    "build_from_config",
    "build_predictor",
    "encoder_from_config",
    "from_fair",
    "load_encoder",
    "load_weights",
    "to_fair",
    "to_hf",
]
