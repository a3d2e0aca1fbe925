"""Files of weights: safetensors that describe themselves, and checkpoints under FAIR's names."""

from __future__ import annotations

import functools
from pathlib import Path

import torch

from vjepa_fast.export.api import FORMATS, Format, Reader, outputs
from vjepa_fast.models.describe import architecture, metadata
from vjepa_fast.models.interop import load_encoder, to_fair
from vjepa_fast.models.names import one_norm
from vjepa_fast.models.vit import VisionTransformer


def save_tensors(state: dict[str, torch.Tensor], path: Path, about: dict[str, str] | None = None) -> None:
    """A safetensors file that can be read by whoever can read other files of ours; ``about``: metadata."""
    from safetensors.torch import save_file

    path.touch()
    mode = path.stat().st_mode
    state = {key: value.contiguous() for key, value in state.items()}
    save_file(state, path, metadata={"format": "pt", **(about or {})})
    path.chmod(mode)  # safetensors writes for the owner alone


class Safetensors(Format):
    """A ``.safetensors`` file under our names, which are FAIR's, with the architecture in its metadata."""

    what = "weights with their architecture"
    tolerance = 0.0
    suffix = ".safetensors"

    def write(self, encoder: VisionTransformer, path: Path, which: str) -> str:
        """One file, read by ``load_encoder`` without a further argument."""
        state = encoder.state_dict()
        save_tensors(state, path, metadata(encoder))
        return f"{len(state)} tensors and the architecture; load_encoder reads it"

    def read(self, path: Path, encoder: VisionTransformer, which: str) -> Reader:
        """By ``load_encoder``."""
        return functools.partial(outputs, load_encoder(path))


class Fair(Format):
    """A ``.pt`` file as FAIR's code writes it: ``module.backbone.`` before the names, one entry per network."""

    what = "a checkpoint of FAIR's code"
    tolerance = 0.0
    suffix = ".pt"

    def objection(self, encoder: VisionTransformer) -> str:
        """FAIR's code has neither class tokens nor block-causal attention."""
        if encoder.cls_token is not None or encoder.block_causal:
            return "FAIR's code has no class token and no block-causal attention (LeVJEPA); use --to hf or safetensors"
        return ""

    def write(self, encoder: VisionTransformer, path: Path, which: str) -> str:
        """One file with one entry, named as FAIR's code names the network."""
        state, kind = encoder.state_dict(), "V-JEPA 2.1"
        if is_vjepa2(encoder):
            state, kind = one_norm(state), "V-JEPA 2" if encoder.use_rope else "V-JEPA"
        name = "ema_encoder" if kind == "V-JEPA 2.1" and which == "target_encoder" else which
        torch.save({name: {key: value.clone() for key, value in to_fair(state).items()}}, path)
        return f"{kind}, entry {name!r}, {len(state)} tensors"

    def read(self, path: Path, encoder: VisionTransformer, which: str) -> Reader:
        """By ``load_encoder``, told the architecture, of which such a file holds a part only."""
        told = architecture(encoder)
        told["img_size"] = encoder.img_size
        return functools.partial(outputs, load_encoder(path, which, **told))


def is_vjepa2(encoder: VisionTransformer) -> bool:
    """Whether an encoder has the parts of a V-JEPA (2) and no others: one level, one kind of input."""
    return encoder.levels == 1 and not encoder.modality_embedding and encoder.img_temporal_dim_size is None


FORMATS.add("safetensors", Safetensors())
FORMATS.add("fair", Fair())
