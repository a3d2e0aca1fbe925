"""How much room the masks of a step get (``runtime.capacity_quantum``): shapes that repeat instead of exact lengths."""

from __future__ import annotations

import logging

import torch

from vjepa_fast.config.schema import Config
from vjepa_fast.layers import attention
from vjepa_fast.models.predictor import Predictor
from vjepa_fast.models.vit import VisionTransformer

_log = logging.getLogger("vjepa_fast")


def quantum(
    cfg: Config, device: torch.device, dtype: torch.dtype, encoder: VisionTransformer, predictor: Predictor
) -> int | None:
    """Tokens that the room for a mask is a multiple of, as ``DrawnMasks.wait`` takes them.

    Returns:
        0 for exact lengths, None for a 16th of the tokens of the batch. ``auto`` is the latter on CUDA in 16 bits
        where an attention backend reads lengths on the device, and the former elsewhere.

    Raises:
        ConfigError: ``runtime.attention`` forces a backend that cannot do so.
    """
    runtime = cfg.runtime
    choice = runtime.pad_to_multiple or runtime.capacity_quantum
    forced = attention.find(runtime.attention)
    heads = {model.embed_dim // model.num_heads for model in (encoder, predictor)}
    calls = [attention.Call(device, dtype, channels, segments=2, on_device=True) for channels in heads]
    if choice != "auto":
        if choice and forced is not None:
            for call in calls:
                attention.require(forced, call)
        return int(choice)
    if device.type != "cuda":
        return 0
    backends = [b for b in attention.BACKENDS.values() if b is not attention.SDPA] if forced is None else [forced]
    refusals = {b.name: [text for call in calls for text in b.refusals(call)] for b in backends}
    if dtype == torch.float32 or all(refusals.values()):  # in float32 what can, goes without tensor cores
        reasons = "; ".join(f"{name}: {texts[0]}" for name, texts in refusals.items() if texts)
        _log.warning("runtime.capacity_quantum: auto is 0, lengths are new at every step (%s)", reasons)
        return 0
    return None
