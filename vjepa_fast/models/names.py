"""State dicts of encoders under other people's names."""

from __future__ import annotations

import re

from torch import Tensor

State = dict[str, Tensor]


def one_norm(state: State) -> State:
    """The names of V-JEPA and V-JEPA 2, which have one final ``norm``, for an encoder of one level."""
    return {re.sub(r"^norms_block\.0\.", "norm.", key): value for key, value in state.items()}


def to_hf(state: State) -> State:
    """The names of Hugging Face's ``VJEPA2Model`` for the encoder of a V-JEPA 2.

    Args:
        state: names of an encoder of this package with one level, or FAIR's without wrappers' prefixes.

    Returns:
        ``encoder.embeddings...``, ``encoder.layer.N...``, ``encoder.layernorm...``, queries, keys and values apart; the
        same values, not copied.
    """
    found: State = {}
    for key, value in one_norm(state).items():
        name = re.sub(r"^blocks\.", "layer.", key).replace(".attn.", ".attention.")
        name = re.sub(r"^patch_embed\.", "embeddings.patch_embeddings.", name)
        name = "encoder." + re.sub(r"^norm\.", "layernorm.", name)
        if ".qkv." in name:
            for part, rows in zip(("query", "key", "value"), value.chunk(3)):
                found[name.replace("qkv", part)] = rows
        else:
            found[name] = value
    return found
