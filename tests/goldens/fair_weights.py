"""Writes ``fair_vjepa.safetensors`` and ``fair_vjepa2.safetensors``: tiny random encoders of FAIR's code, and outputs.

Run once for each checkout, by hand; the tests only read the files:

    git clone https://github.com/facebookresearch/jepa && python tests/goldens/fair_weights.py fair_vjepa jepa
    git clone https://github.com/facebookresearch/vjepa2 && python tests/goldens/fair_weights.py fair_vjepa2 vjepa2

``sd/``: the state dict, with the names of the checkpoints. ``in/`` and ``out/``: clips and the encoder's outputs. The
files here are of commits 51c59d5 and c2963a4, torch 2.14, CPU.
"""

from __future__ import annotations

import sys
import types
from pathlib import Path

import torch
from safetensors.torch import save_file

WIDTH, DEPTH, HEADS, PATCH, SIDE, FRAMES = 24, 3, 2, 8, 32, 4
CLIPS = {"built": (FRAMES, SIDE, SIDE), "larger": (FRAMES, 48, 48), "longer": (8, SIDE, SIDE)}


def main(name: str, checkout: str) -> None:
    sys.path.insert(0, checkout)
    sys.modules.setdefault("einops", types.SimpleNamespace(rearrange=None))  # imported there and not used
    from src.models.vision_transformer import VisionTransformer

    torch.manual_seed(0)
    more = {"use_rope": True} if name == "fair_vjepa2" else {}
    sizes = dict(patch_size=PATCH, num_frames=FRAMES, embed_dim=WIDTH, depth=DEPTH, num_heads=HEADS)
    norm = lambda width: torch.nn.LayerNorm(width, eps=1e-6)  # noqa: E731
    encoder = VisionTransformer(
        img_size=SIDE, **sizes, mlp_ratio=2, qkv_bias=True, norm_layer=norm, uniform_power=True, **more
    ).eval()
    with torch.no_grad():
        for key, parameter in encoder.named_parameters():
            if key != "pos_embed":  # gains and biases that matter, and attention that is not uniform
                parameter.add_(torch.randn_like(parameter) * (0.5 if "qkv" in key else 0.1))
        found = {f"sd/module.backbone.{key}": value for key, value in encoder.state_dict().items()}
        for key, shape in CLIPS.items():
            clip = torch.randn(1, 3, *shape)
            found |= {f"in/{key}": clip, f"out/{key}": encoder(clip)}
    save_file({key: value.contiguous() for key, value in found.items()}, Path(__file__).parent / f"{name}.safetensors")


if __name__ == "__main__":
    main(*sys.argv[1:])
