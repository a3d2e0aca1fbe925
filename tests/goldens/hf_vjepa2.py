"""Writes ``hf_vjepa2.safetensors`` and ``.json``: a tiny random VJEPA2Model of transformers, a clip and its output.

Run once, by hand, away from the checkout (transformers takes its folder ``kernels`` for a package of that name):

    pip install transformers && cd / && python .../tests/goldens/hf_vjepa2.py

``sd/``: the state dict; ``in/clip`` [2,3,F,height,width] and ``out/clip`` [2,N,width]. The files here are of
transformers 5.24.0, torch 2.14.1, CPU.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import VJEPA2Config, VJEPA2Model


def main() -> None:
    torch.manual_seed(0)
    sizes = dict(patch_size=8, crop_size=32, frames_per_clip=4, hidden_size=24, num_attention_heads=2, mlp_ratio=2)
    predictor = dict(pred_hidden_size=12, pred_num_attention_heads=2, pred_num_hidden_layers=1, pred_num_mask_tokens=2)
    config = VJEPA2Config(**sizes, **predictor, num_hidden_layers=3)
    model = VJEPA2Model(config).eval()
    clip = torch.randn(2, 3, 4, 32, 32)
    with torch.no_grad():
        for key, parameter in model.named_parameters():  # gains and biases that matter, attention that is not uniform
            sharp = any(name in key for name in ("query", "key", "value"))
            parameter.add_(torch.randn_like(parameter) * (0.5 if sharp else 0.1))
        out = model(clip.transpose(1, 2), skip_predictor=True).last_hidden_state
    found = {f"sd/{key}": value for key, value in model.state_dict().items()}
    found |= {"in/clip": clip, "out/clip": out}
    here = Path(__file__).parent
    save_file({key: value.contiguous() for key, value in found.items()}, here / "hf_vjepa2.safetensors")
    (here / "hf_vjepa2.json").write_text(json.dumps(config.to_dict(), indent=1) + "\n")


if __name__ == "__main__":
    main()
