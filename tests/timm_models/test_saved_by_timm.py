"""What timm has saved of one of its ``vjepa_fast_...`` models (tests/goldens/timm_vit.py)."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from vjepa_fast.errors import CheckpointError
from vjepa_fast.models import load_encoder

GOLDENS = Path(__file__).parents[1] / "goldens"


@pytest.fixture
def saved(tmp_path):
    return Path(shutil.copytree(GOLDENS / "timm_vit", tmp_path / "saved"))


def test_an_encoder_needs_no_further_argument(saved):
    said = load_file(GOLDENS / "timm_vit.safetensors")
    for path in (saved, saved / "model.safetensors"):
        encoder = load_encoder(path)
        assert (encoder.num_heads, encoder.levels, encoder.rope_variant) == (4, 2, "v2")
        assert encoder.clip_settings["crop_size"] == 32 and encoder.clip_settings["num_frames"] == 4
        assert encoder.clip_settings["fps"] is None
        with torch.no_grad():
            found = encoder(said["in/clip"])[..., -24:]
        assert (found - said["out/clip"]).abs().max() < 1e-5


def test_what_the_caller_gives_wins(saved):
    assert load_encoder(saved, img_size=48, num_frames=8).clip_settings["crop_size"] == 48
    with pytest.raises(CheckpointError, match=r"model.safetensors: checkpoint of another architecture: .*blocks"):
        load_encoder(saved, depth=6)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"architecture": "vjepa_fast_vit_enormous_patch16_224"}, "there is no encoder 'vjepa_fast_vit_enormous"),
        ({"model_args": {"registers": 4}}, "has no argument 'registers'"),
        ({"model_args": [1]}, r"with arguments \[1\]"),
        ({"model_args": {"embed_dim": "wide"}}, "describes an encoder that cannot be built"),
        ({"model_args": {"embed_dim": 24, "depth": 4, "num_heads": 4, "patch_size": 16}}, "another architecture"),
    ],
)
def test_what_does_not_fit_is_refused(saved, change, words):
    config = json.loads((saved / "config.json").read_text())
    (saved / "config.json").write_text(json.dumps({**config, **change}))
    with pytest.raises(CheckpointError, match=words):
        load_encoder(saved)


def test_the_heads_of_a_released_width_are_those_that_timm_was_given(tmp_path):
    timm = pytest.importorskip("timm")
    import vjepa_fast.timm_models  # noqa: F401

    arguments = dict(img_size=32, num_frames=4, embed_dim=192, num_heads=6, depth=2, levels=1)
    model = timm.create_model("vjepa_fast_vit_small_patch16_224", **arguments).eval()
    timm.models.save_for_hf(model, tmp_path / "six", safe_serialization=True)
    clip = torch.randn(1, 3, 4, 32, 32)
    with torch.no_grad():
        assert torch.equal(load_encoder(tmp_path / "six")(clip), model.forward_features(clip))


def test_timm_reads_it_back(saved):
    timm = pytest.importorskip("timm")
    import vjepa_fast.timm_models  # noqa: F401

    said = load_file(GOLDENS / "timm_vit.safetensors")
    model = timm.create_model(f"local-dir:{saved}", pretrained=True).eval()
    with torch.no_grad():
        assert (model.forward_features(said["in/clip"]) - said["out/clip"]).abs().max() < 1e-5
