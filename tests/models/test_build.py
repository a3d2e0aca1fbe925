"""Models from a configuration, timm names."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from vjepa_fast import config
from vjepa_fast.models import build_encoder, build_from_config
from vjepa_fast.models.timm_names import register_timm

TINY = {
    "data": {"crop_size": 32, "patch_size": 8, "dataset_fpcs": [4, 2], "datasets": ["a.csv", "b.csv"]},
    "model": {"embed_dim": 24, "depth": 4, "num_heads": 2, "pred_embed_dim": 12, "pred_depth": 2, "pred_num_heads": 2},
}


def tiny(**model):
    return config.from_dict({**TINY, "model": {**TINY["model"], **model}})


def test_config_reaches_the_models():
    cfg = tiny(
        levels=2,
        use_silu=True,
        wide_silu=False,
        pred_use_silu=True,
        predict_all=False,
        rope_variant="v2",
        normalize_predictor=True,
        use_activation_checkpointing=True,
        interpolate_rope=False,
    )
    encoder, predictor = build_from_config(cfg)
    assert encoder.built_grid == (2, 4, 4) and encoder.levels == predictor.levels == 2
    assert encoder.blocks[0].mlp.fc3.weight.shape == (24, 96) and hasattr(predictor.predictor_blocks[0].mlp, "fc3")
    assert not predictor.return_all_tokens and predictor.normalize and predictor.rope_base is None
    assert encoder.rope_variant == predictor.rope_variant == "v2"
    assert encoder.use_activation_checkpointing and predictor.use_activation_checkpointing
    assert predictor.num_mask_tokens == len(cfg.masks.specs) == 2


def test_mask_tokens_of_a_configuration():
    assert build_from_config(tiny(num_mask_tokens=6))[1].num_mask_tokens == 6
    three = {**TINY, "img_data": TINY["data"], "img_masks": {"specs": [{}, {}, {}]}}
    assert build_from_config(config.from_dict(three, checked=False))[1].num_mask_tokens == 3


def test_published_recipes_build_on_meta():
    recipes = [name for name in config.list_recipes() if name.startswith(("mixed", "single", "ucf"))]
    assert recipes
    for name in recipes[:3]:
        encoder, predictor = build_from_config(config.load(name), "meta")
        assert encoder.embed_dim == 768 and predictor.embed_dim == 256 and encoder.blocks[0].norm1.weight.is_meta


def test_same_seed_same_weights():
    states = []
    for _ in range(2):
        torch.manual_seed(3)
        encoder, predictor = build_from_config(tiny())
        states.append({**encoder.state_dict(), **predictor.state_dict()})
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])


def test_timm_names():
    timm = pytest.importorskip("timm")
    names = register_timm()
    assert register_timm() == names and "vjepa_fast_vit_base" in names
    model = timm.create_model("vjepa_fast_vit_tiny", img_size=64, num_frames=4)
    assert model.built_grid == (2, 4, 4)
    torch.manual_seed(0)
    a = timm.create_model("vjepa_fast_vit_tiny", depth=4, img_size=32, num_frames=2)
    torch.manual_seed(0)
    b = build_encoder("vit_tiny", depth=4, img_size=32, num_frames=2)
    clip = torch.randn(1, 3, 2, 32, 32)
    assert torch.equal(a(clip), b(clip))
    with pytest.raises(ValueError, match="load_encoder"):
        timm.create_model("vjepa_fast_vit_tiny", pretrained=True)


def test_timm_is_imported_only_when_asked():
    code = "import vjepa_fast.models, sys; sys.exit('timm' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
