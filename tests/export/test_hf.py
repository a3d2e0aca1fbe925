"""Folders for transformers: its own model where it computes the same, else ours in plain PyTorch."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.export.conftest import KINDS
from vjepa_fast.errors import CheckpointError, UserError
from vjepa_fast.export import export_encoder, plain_encoder
from vjepa_fast.export.formats import hf
from vjepa_fast.models import load_encoder, to_hf
from vjepa_fast.models.describe import architecture
from vjepa_fast.models.names import one_norm

GOLDENS = Path(__file__).resolve().parents[1] / "goldens"
CLIP = torch.randn(2, 3, 4, 32, 32, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="session")
def cache(tmp_path_factory):
    """Where transformers puts the code of folders, and imports it from."""
    return str(tmp_path_factory.mktemp("modules"))


@pytest.fixture
def modules(cache, monkeypatch, transformers):
    """The package transformers, which leaves the user's cache alone."""
    from transformers import dynamic_module_utils

    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", cache)
    return transformers


@pytest.mark.parametrize("kind", KINDS)
def test_remote_code(tmp_path, make, modules, kind):
    encoder, folder = make(kind), tmp_path / "model"
    export_encoder(encoder, "hf", folder)
    native = kind == "V-JEPA 2"
    assert (folder / "modeling_vjepa21.py").is_file() != native
    model = modules.AutoModel.from_pretrained(folder, trust_remote_code=not native).eval()
    clip = torch.randn(2, 3, 4, *encoder.img_size, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        wanted, last = encoder(clip), encoder(clip, hierarchical=False)
        out = model(clip.transpose(1, 2), **({"skip_predictor": True} if native else {}))
        assert (out.last_hidden_state - last).abs().max() < 1e-5 * last.abs().max()
        if not native:
            assert (out.levels - wanted).abs().max() < 1e-5 * wanted.abs().max()
            pooled = encoder.summary(clip, None) if kind == "LeVJEPA" else last.mean(1)
            assert (out.pooler_output - pooled).abs().max() < 1e-5 * wanted.abs().max()
    loaded = load_encoder(folder)
    mine, its = encoder.state_dict(), loaded.state_dict()
    assert mine.keys() == its.keys() and all(torch.equal(mine[key], its[key]) for key in mine)
    assert native or architecture(loaded) == architecture(encoder)


def test_saved_again_by_transformers(tmp_path, make, modules):
    encoder = make("V-JEPA 2.1")
    export_encoder(encoder, "hf", tmp_path / "one")
    model = modules.AutoModel.from_pretrained(tmp_path / "one", trust_remote_code=True)
    model.save_pretrained(tmp_path / "two")
    loaded, state = load_encoder(tmp_path / "two"), encoder.state_dict()
    assert all(torch.equal(value, state[key]) for key, value in loaded.state_dict().items())
    assert architecture(loaded) == architecture(encoder)


def test_hf_in_and_out(tmp_path, transformers):
    """Transformers' own tensors come back under its own names, to the last bit."""
    torch.manual_seed(0)
    sizes = dict(patch_size=8, crop_size=32, frames_per_clip=4, hidden_size=24, num_attention_heads=2)
    predictor = dict(pred_hidden_size=12, pred_num_attention_heads=2, pred_num_hidden_layers=1)
    model = transformers.VJEPA2Model(transformers.VJEPA2Config(**sizes, **predictor, num_hidden_layers=2)).eval()
    model.save_pretrained(tmp_path / "in")
    export_encoder(load_encoder(tmp_path / "in"), "hf", tmp_path / "out")
    back, state = (load_file(tmp_path / name / "model.safetensors") for name in ("out", "in"))
    encoder = {key for key in state if key.startswith("encoder.")}
    assert {key for key in back if key.startswith("encoder.")} == encoder
    assert all(torch.equal(back[key], state[key]) for key in encoder)
    assert not any(value.any() for key, value in back.items() if key not in encoder)
    again = transformers.VJEPA2Model.from_pretrained(tmp_path / "out").eval()
    with torch.no_grad():
        one, two = (m(CLIP.transpose(1, 2), skip_predictor=True).last_hidden_state for m in (model, again))
    assert torch.equal(one, two)


def test_golden_of_transformers(tmp_path):
    """What transformers' VJEPA2Model said of a clip (tests/goldens/hf_vjepa2.py); needs no transformers."""
    arrays = load_file(GOLDENS / "hf_vjepa2.safetensors")
    state = {key[3:]: value for key, value in arrays.items() if key.startswith("sd/")}
    shutil.copy(GOLDENS / "hf_vjepa2.json", tmp_path / "config.json")
    save_file(state, tmp_path / "model.safetensors")
    encoder = load_encoder(tmp_path)
    with torch.no_grad():
        out = encoder(arrays["in/clip"])
    wanted = arrays["out/clip"]
    assert out.shape == wanted.shape and (out - wanted).abs().max() < 1e-5 * wanted.abs().max()
    back = to_hf(one_norm(encoder.state_dict()))
    assert all(torch.equal(back[key], state[key]) for key in back)
    assert set(back) == {key for key in state if key.startswith("encoder.")}


def test_processor(tmp_path, make, transformers):
    pytest.importorskip("torchvision")
    export_encoder(make("oblong"), "hf", tmp_path / "x")
    processor = transformers.AutoVideoProcessor.from_pretrained(tmp_path / "x")
    video = torch.full((4, 3, 60, 80), 128, dtype=torch.uint8)
    clip = processor(video, return_tensors="pt")["pixel_values_videos"]
    assert clip.shape == (1, 4, 3, 32, 48)
    wanted = (128 / 255 - torch.tensor([0.1, 0.2, 0.3])) / torch.tensor([0.229, 0.224, 0.225])
    assert (clip.mean((0, 1, 3, 4)) - wanted).abs().max() < 1e-4


@pytest.mark.parametrize(("variant", "base"), [("v2.1", True), ("v2", False)])
def test_clips_of_other_sizes_and_chosen_tokens(make, variant, base):
    encoder = make("V-JEPA 2.1" if base else "V-JEPA 2")
    clip = torch.randn(2, 3, 6, 48, 32, generator=torch.Generator().manual_seed(2))
    ids = torch.stack([torch.arange(0, 60, 7), torch.arange(3, 66, 7)])
    plain = plain_encoder(encoder)
    with torch.no_grad():
        for chosen in (None, ids):
            wanted = encoder(clip, chosen)
            assert (torch.cat(plain(clip, chosen), -1) - wanted).abs().max() < 1e-5 * wanted.abs().max()
    with pytest.raises(ValueError, match="a clip of 5 frames of 48 x 32 pixels does not divide"):
        plain(clip[:, :, :5])


def test_plain_encoder_of_chosen_tokens_with_a_class_token(make):
    encoder = make("LeVJEPA")
    ids = torch.stack([torch.arange(0, 32, 3), torch.arange(1, 32, 3)[:11].roll(0)])[:, :10]
    with torch.no_grad():
        levels = plain_encoder(encoder)(CLIP, ids)
        wanted = encoder(CLIP, ids)
        assert (torch.cat([x[:, 1:] for x in levels], -1) - wanted).abs().max() < 1e-5 * wanted.abs().max()
        assert (levels[-1][:, 0] - encoder.summary(CLIP, ids)).abs().max() < 1e-5 * wanted.abs().max()


def test_the_encoders_file_needs_torch_alone(tmp_path, make):
    pytest.importorskip("transformers")
    export_encoder(make("V-JEPA 2.1"), "hf", tmp_path / "x")
    code = "import sys, encoder_vjepa21; print([m for m in ('vjepa_fast', 'transformers', 'timm') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path / "x", text=True, capture_output=True, timeout=120)
    assert done.stdout.strip() == "[]", done.stderr


def test_a_damaged_description(tmp_path, make):
    pytest.importorskip("transformers")
    export_encoder(make("V-JEPA 2.1"), "hf", tmp_path / "x")
    held = json.loads((tmp_path / "x" / "config.json").read_text())
    del held["rope_variant"]
    (tmp_path / "x" / "config.json").write_text(json.dumps(held))
    with pytest.raises(CheckpointError, match="config.json does not describe an encoder .KeyError: 'rope_variant'"):
        load_encoder(tmp_path / "x")


def test_without_transformers(tmp_path, make, monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(UserError, match="--to hf needs transformers"):
        export_encoder(make("V-JEPA 2"), "hf", tmp_path / "x")
    assert not list(tmp_path.iterdir())


def test_what_transformers_own_model_cannot_hold(make):
    reasons = {kind: hf.not_vjepa2(make(kind)) for kind in KINDS}
    assert reasons.pop("V-JEPA 2") == "" and all(reasons.values()), reasons
