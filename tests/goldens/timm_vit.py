"""Writes the folder ``timm_vit``, what timm saves of a ``vjepa_fast_...`` model of its, and ``timm_vit.safetensors``.

Run once, by hand, from the root of the checkout: ``python tests/goldens/timm_vit.py``

The model is tiny and random, and each of its arguments leaves other numbers or another tensor than the default would:
heads that its width does not tell, V-JEPA 2's rotary positions, two levels. ``in/clip`` [2,3,F,height,width] and
``out/clip`` [2,N,E], what timm's model says of it. The files here are of timm 1.0.31, torch 2.14.1, CPU.
"""

from __future__ import annotations

from pathlib import Path

import timm
import torch
from safetensors.torch import save_file

import vjepa_fast.timm_models  # noqa: F401  # registers them

ARGUMENTS = dict(img_size=32, num_frames=4, patch_size=8, embed_dim=24, depth=4, num_heads=4, levels=2)


def main() -> None:
    torch.manual_seed(0)
    rope = dict(rope_variant="v2", interpolate_rope=False, img_temporal_dim_size=0)
    model = timm.create_model("vjepa_fast_vit_tiny_patch16_224", num_classes=3, **ARGUMENTS, **rope).eval()
    clip = torch.randn(2, 3, 4, 32, 32)
    with torch.no_grad():
        for key, parameter in model.named_parameters():  # gains and biases that matter, attention that is not uniform
            parameter.add_(torch.randn_like(parameter) * (0.5 if "qkv" in key else 0.1))
        out = model.forward_features(clip)
    here = Path(__file__).parent
    timm.models.save_for_hf(model, here / "timm_vit", safe_serialization=True)
    save_file({"in/clip": clip, "out/clip": out.contiguous()}, here / "timm_vit.safetensors")


if __name__ == "__main__":
    main()
