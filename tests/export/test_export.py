"""Files of weights out and in again, and what the export refuses."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.export.conftest import KINDS
from vjepa_fast import cli, export
from vjepa_fast.errors import CheckpointError, UserError
from vjepa_fast.export import FORMATS, Format, api, export_encoder
from vjepa_fast.models import build_encoder, load_encoder, to_fair
from vjepa_fast.models.describe import architecture

GOLDENS = Path(__file__).resolve().parents[1] / "goldens"
CLIP = torch.randn(1, 3, 4, 32, 48, generator=torch.Generator().manual_seed(1))


def same(one, other):
    mine, its = one.state_dict(), other.state_dict()
    assert mine.keys() == its.keys() and all(torch.equal(mine[key], its[key]) for key in mine)
    assert architecture(one) == architecture(other)
    with torch.no_grad():
        assert torch.equal(one(CLIP), other(CLIP))


@pytest.mark.parametrize("kind", KINDS)
def test_safetensors_need_no_further_argument(tmp_path, make, kind, caplog):
    encoder, file = make(kind), tmp_path / "deep" / "x.safetensors"
    with caplog.at_level(logging.INFO, "vjepa_fast"):
        done = export_encoder(encoder, "safetensors", file)
    assert (done.path, done.difference, done.tolerance) == (file, 0.0, 0.0) and done.largest > 1
    assert not caplog.records  # nothing about a file that has no name yet
    same(load_encoder(file), encoder)
    assert [path.name for path in file.parent.iterdir()] == ["x.safetensors"]
    beside = tmp_path / "beside"
    beside.touch()
    assert file.stat().st_mode == beside.stat().st_mode


def test_clip_settings_travel(tmp_path, make):
    encoder = make("oblong")
    known = dict(crop_size=32, num_frames=4, frame_step=3, fps=None, duration=None)
    encoder.clip_settings = {**known, "mean": (0.1, 0.2, 0.3), "tubelet_size": 2}
    export_encoder(encoder, "safetensors", tmp_path / "x.safetensors")
    loaded = load_encoder(tmp_path / "x.safetensors")
    assert known.items() <= loaded.clip_settings.items()
    assert loaded.clip_settings["mean"] == (0.1, 0.2, 0.3) and loaded.clip_settings["tubelet_size"] == 2
    other = load_encoder(tmp_path / "x.safetensors", num_frames=8, img_size=64)
    assert other.clip_settings["num_frames"] == 8 and other.clip_settings["crop_size"] == 64


@pytest.mark.parametrize("which", ["target_encoder", "encoder"])
@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "LeVJEPA"])
def test_fair_out_and_in(tmp_path, make, kind, which):
    encoder, file = make(kind), tmp_path / "x.pt"
    assert export_encoder(encoder, "fair", file, which=which).difference == 0
    content = torch.load(file, weights_only=True)
    old = kind in ("V-JEPA", "V-JEPA 2")
    assert list(content) == [which if old or which == "encoder" else "ema_encoder"]
    (state,) = content.values()
    assert all(key.startswith("module.backbone.") for key in state)
    assert ("module.backbone.norm.weight" in state) == old
    told = {**architecture(encoder), "img_size": encoder.img_size}
    same(load_encoder(file, which, **told), encoder)


@pytest.mark.parametrize("name", ["fair_vjepa", "fair_vjepa2"])
def test_fair_in_and_out(tmp_path, name):
    """FAIR's own tensors come back under FAIR's own names, to the last bit."""
    arrays = load_file(GOLDENS / f"{name}.safetensors")
    state = {key[3:]: value for key, value in arrays.items() if key.startswith("sd/")}
    torch.save({"target_encoder": state}, tmp_path / "in.pt")
    flags = {"use_rope": False} if name == "fair_vjepa" else {"rope_variant": "v2"}
    encoder = load_encoder(tmp_path / "in.pt", num_heads=2, img_size=32, num_frames=4, **flags)
    export_encoder(encoder, "fair", tmp_path / "out.pt")
    back = torch.load(tmp_path / "out.pt", weights_only=True)["target_encoder"]
    assert back.keys() == state.keys() and all(torch.equal(back[key], state[key]) for key in state)


def test_levels_of_fair_in_and_out(tmp_path, make):
    state = to_fair(make("V-JEPA 2.1").state_dict())
    torch.save({"ema_encoder": state}, tmp_path / "in.pt")
    encoder = load_encoder(tmp_path / "in.pt", num_heads=2, img_size=32, num_frames=4)
    export_encoder(encoder, "fair", tmp_path / "out.pt")
    back = torch.load(tmp_path / "out.pt", weights_only=True)["ema_encoder"]
    assert back.keys() == state.keys() and all(torch.equal(back[key], state[key]) for key in state)


@pytest.mark.parametrize(
    ("to", "out", "kind", "words"),
    [
        ("fairr", "x.pt", "V-JEPA 2", "to: unknown export format 'fairr'.*did you mean fair"),
        ("fair", "x.bin", "V-JEPA 2", "x.bin: the name of a fair file ends in .pt"),
        ("hf", "x.pt", "V-JEPA 2", "x.pt: hf is a folder, not a .pt file"),
        ("fair", "there.pt", "V-JEPA 2", "there.pt: exists; remove it or choose another --out"),
        ("fair", "there.pt/x.pt", "V-JEPA 2", "there.pt/x.pt: cannot be written"),
        ("fair", "x.pt", "LeVJEPA", "--to fair: FAIR's code has no class token"),
    ],
)
def test_refusals(tmp_path, make, to, out, kind, words):
    (tmp_path / "there.pt").write_text("mine")
    with pytest.raises(UserError, match=words) as caught:
        export_encoder(make(kind), to, tmp_path / out)
    assert "\n" not in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["there.pt"]
    assert (tmp_path / "there.pt").read_text() == "mine"


class Noisy(Format):
    """Says what it is told to."""

    what, suffix, tolerance = "noise", ".txt", 1e-3

    def __init__(self, say):
        self.say = say

    def write(self, encoder, path, which):
        path.write_text("x")
        path.with_name("x.extra").write_text("y")
        return "noise"

    def read(self, path, encoder, which):
        return lambda clip: self.say({"features": encoder(clip)})


def failing(found):
    raise RuntimeError("no such\nkernel")


@pytest.mark.parametrize(
    ("say", "words"),
    [
        (lambda found: {"features": found["features"] + 1}, "differs from the encoder by 1 at values up to .*0.001 of"),
        (lambda found: {"features": found["features"] * float("nan")}, "differs from the encoder by inf"),
        (lambda found: {"features": found["features"][:, 1:]}, "differs from the encoder by inf"),
        (lambda found: {}, "differs from the encoder by inf"),
        (failing, "--to noisy: RuntimeError: no such; nothing was written"),
    ],
)
def test_a_difference_leaves_nothing_behind(tmp_path, make, monkeypatch, say, words):
    monkeypatch.setitem(FORMATS._entries, "noisy", Noisy(say))
    with pytest.raises(UserError, match=words):
        export_encoder(make("V-JEPA 2"), "noisy", tmp_path / "x.txt")
    assert not list(tmp_path.iterdir())


def test_what_is_beside_a_file_comes_along(tmp_path, make, monkeypatch):
    noise = Noisy(lambda found: {"features": found["features"] * (1 + 2e-4)})
    monkeypatch.setitem(FORMATS._entries, "noisy", noise)
    done = export_encoder(make("V-JEPA 2"), "noisy", tmp_path / "x.txt")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["x.extra", "x.txt"]
    assert 0 < done.difference <= 1e-3 * done.largest and done.clips == ((2, 3, 4, 32, 32),)
    with pytest.raises(TypeError, match="must be an instance of vjepa_fast.export.Format"):
        FORMATS.add("other", object())


def test_encoders_that_train_or_are_in_low_precision_stay_as_they_are(tmp_path, make):
    encoder = build_encoder(embed_dim=24, depth=2, num_heads=2, levels=2, img_size=32, num_frames=4).bfloat16()
    export_encoder(encoder, "safetensors", tmp_path / "x.safetensors")
    assert encoder.training and encoder.patch_embed.proj.weight.dtype == torch.bfloat16
    loaded = load_encoder(tmp_path / "x.safetensors")
    assert torch.equal(loaded.patch_embed.proj.weight, encoder.patch_embed.proj.weight.float())


def test_compared_clips_are_the_same_every_time(make):
    encoder = make("V-JEPA 2.1")
    torch.manual_seed(3)
    before = torch.get_rng_state()
    first, second = (api.seeded_clips(encoder, images=True) for _ in range(2))
    assert [tuple(clip.shape) for clip in first] == [(2, 3, 4, 32, 32), (2, 3, 1, 32, 32)]
    assert all(torch.equal(a, b) for a, b in zip(first, second)) and torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{", "metadata 'vjepa_fast' does not describe an encoder"),
        ("{}", "does not describe an encoder .KeyError: 'architecture'.; export it again"),
        (None, "describes an encoder that cannot be built"),
    ],
)
def test_a_description_that_is_no_use(tmp_path, make, text, words):
    encoder = make("V-JEPA 2.1")
    if text is None:
        text = json.dumps({"architecture": {**architecture(encoder), "depth": "two"}, "clip_settings": None})
    save_file(encoder.state_dict(), tmp_path / "x.safetensors", metadata={"vjepa_fast": text})
    with pytest.raises(CheckpointError, match=words) as caught:
        load_encoder(tmp_path / "x.safetensors")
    assert str(caught.value).startswith(str(tmp_path / "x.safetensors")) and "\n" not in str(caught.value)


def test_command(tmp_path, make, capsys):
    torch.save({"ema_encoder": make("V-JEPA 2.1").state_dict()}, tmp_path / "x.pt")
    recipe = {"embed_dim": 24, "depth": 2, "num_heads": 2, "levels": 2}
    lines = ["data: {crop_size: 32, patch_size: 8, dataset_fpcs: [4], datasets: [a.csv]}", f"model: {recipe}"]
    (tmp_path / "x.yaml").write_text("\n".join(lines).replace("'", ""))
    words = ["export", str(tmp_path / "x.pt"), "--config", str(tmp_path / "x.yaml"), "--to"]
    assert cli.main([*words, "safetensors", "--out", str(tmp_path / "x.safetensors")]) == 0
    text = capsys.readouterr().out
    assert "compared on [2,3,4,32,32] and [2,3,1,32,32]: largest difference 0 at values up to" in text
    assert "(allowed: none)" in text
    same(load_encoder(tmp_path / "x.safetensors"), make("V-JEPA 2.1"))
    assert cli.main([*words, "nothing", "--out", str(tmp_path / "y")]) == 2
    assert cli.main([*words, "fair", "--which", "encoder", "--out", str(tmp_path / "y.pt")]) == 2
    assert cli.main(["export", str(tmp_path / "none.pt"), "--to", "fair", "--out", str(tmp_path / "y.pt")]) == 2
    errors = capsys.readouterr().err.splitlines()
    assert len(errors) == 3 and all(line.startswith("error: ") for line in errors)
    assert not list(tmp_path.glob("y*")) and export.FORMATS["fair"].suffix == ".pt"
