"""Encoders of other people's files: what is read off their tensors, and what is refused."""

from __future__ import annotations

import json
import logging
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from vjepa_fast import config
from vjepa_fast.errors import CheckpointError
from vjepa_fast.models import SIZES, build_encoder, from_fair, load_encoder, to_fair
from vjepa_fast.models.reading import Evidence, read_encoder
from vjepa_fast.models.rope import sincos_3d
from vjepa_fast.models.weights import encoder_state

ROOT = Path(__file__).resolve().parents[2]
GOLDENS = ROOT / "tests" / "goldens"
PLAIN = dict(levels=1, modality_embedding=False, img_temporal_dim_size=None)
V2 = dict(PLAIN, rope_variant="v2", interpolate_rope=False)
TINY = dict(name="vit_tiny", img_size=32, num_frames=4)
CLIP = torch.randn(1, 3, 4, 48, 48, generator=torch.Generator().manual_seed(0))


def one_norm(state):
    """The names of V-JEPA and V-JEPA 2."""
    return {key.replace("norms_block.0.", "norm."): value for key, value in state.items()}


def golden(name):
    """(state dict with the names of the checkpoint, {case: (clip, output)})."""
    arrays = load_file(GOLDENS / f"{name}.safetensors")
    cases = [key[3:] for key in arrays if key.startswith("in/")]
    state = {key[3:]: value for key, value in arrays.items() if key.startswith("sd/")}
    return state, {case: (arrays[f"in/{case}"], arrays[f"out/{case}"]) for case in cases}


def to_hf(state):
    """The names of Hugging Face's VJEPA2Model for a state dict of V-JEPA 2."""
    found = {}
    for key, value in from_fair(state).items():
        name = key.replace("blocks.", "layer.").replace("patch_embed.", "embeddings.patch_embeddings.")
        name = re.sub(r"^norm\.", "layernorm.", name).replace("attn.", "attention.")
        if "qkv" in name:
            for part, rows in zip(("query", "key", "value"), value.chunk(3)):
                found["encoder." + name.replace("qkv", part)] = rows.clone()
        else:
            found["encoder." + name] = value
    return found | {"predictor.layernorm.weight": torch.ones(4)}


def hf_folder(folder, state, **changes):
    """A folder as ``save_pretrained`` writes it."""
    folder.mkdir()
    save_file(to_hf(state), folder / "model.safetensors", metadata={"format": "pt"})
    held = dict(model_type="vjepa2", num_attention_heads=2, crop_size=32, frames_per_clip=4, hidden_act="gelu")
    (folder / "config.json").write_text(json.dumps({**held, **changes}))
    return folder


@pytest.fixture(scope="module")
def tiny():
    """ViT-tiny of V-JEPA 2, whose attention is not uniform, as after training."""
    torch.manual_seed(0)
    encoder = build_encoder(**TINY, **V2, device="meta").to_empty(device="cpu").eval()
    for parameter in encoder.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return encoder


def check(loaded, cases):
    for case, (clip, wanted) in cases.items():
        with torch.no_grad():
            assert (loaded(clip) - wanted).abs().max() < 1e-5 * wanted.abs().max(), case


@pytest.mark.parametrize(
    ("name", "flags"), [("fair_vjepa", {"use_rope": False}), ("fair_vjepa2", {"rope_variant": "v2"})]
)
def test_outputs_of_fairs_code(tmp_path, name, flags):
    state, cases = golden(name)
    path = tmp_path / "fair.pth.tar"
    torch.save({"encoder": {}, "target_encoder": state, "epoch": 3}, path)
    loaded = load_encoder(path, num_heads=2, **flags)
    check(loaded, cases)
    back = to_fair(one_norm(loaded.state_dict()))
    assert back.keys() == state.keys() and all(torch.equal(back[key], state[key]) for key in state)
    with pytest.raises(CheckpointError, match=f"fits two readings.*give .*{next(iter(flags))}="):
        load_encoder(path, num_heads=2)  # its width is none of FAIR's


def test_outputs_of_the_studys_code(tmp_path):
    arrays = np.load(GOLDENS / "encoder.npz")
    state = {key[3:]: torch.from_numpy(arrays[key]) for key in arrays.files if key.startswith("sd/")}
    torch.save({"ema_encoder": to_fair(state)}, tmp_path / "v21.pt")
    loaded = load_encoder(tmp_path / "v21.pt", num_heads=2)
    for case in ("clip", "img", "clip_nonsquare"):
        full = f"{case}_full" if case in ("clip", "img") else case
        check(loaded, {case: (torch.from_numpy(arrays[f"in/{case}"]), torch.from_numpy(arrays[f"out/train/{full}"]))})


def test_hugging_face_folder(tmp_path):
    state, cases = golden("fair_vjepa2")
    folder = hf_folder(tmp_path / "model", state)
    loaded = load_encoder(folder)
    check(loaded, cases)
    assert loaded.clip_settings["crop_size"] == 32 and loaded.clip_settings["num_frames"] == 4
    assert load_encoder(folder / "model.safetensors").checkpoint_hash == loaded.checkpoint_hash  # config.json beside it
    whole = load_file(folder / "model.safetensors")
    names = {"a.safetensors": list(whole)[::2], "b.safetensors": list(whole)[1::2]}
    for name, keys in names.items():
        save_file({key: whole[key] for key in keys}, folder / name)
    index = {"weight_map": {key: name for name, keys in names.items() for key in keys}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "model.safetensors").unlink()
    assert load_encoder(folder).checkpoint_hash == loaded.checkpoint_hash
    back = to_hf(one_norm(loaded.state_dict()))
    assert all(torch.equal(back[key], whole[key]) for key in whole)
    classifier = {f"vjepa2.{key}": value for key, value in whole.items()} | {"classifier.weight": torch.ones(2, 24)}
    save_file(classifier, tmp_path / "classifier.safetensors")
    assert load_encoder(tmp_path / "classifier.safetensors", num_heads=2).checkpoint_hash == loaded.checkpoint_hash


def test_transformers_itself(tmp_path, monkeypatch):
    # it looks for a package "kernels" of its own, and would find the folder of ours
    elsewhere = [path for path in sys.path if Path(path).resolve() != ROOT]
    monkeypatch.setattr(sys, "path", elsewhere)
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    sizes = dict(patch_size=8, crop_size=32, frames_per_clip=4, hidden_size=24, num_attention_heads=2)
    predictor = dict(pred_hidden_size=12, pred_num_attention_heads=2, pred_num_hidden_layers=1)
    model = transformers.VJEPA2Model(transformers.VJEPA2Config(**sizes, **predictor, num_hidden_layers=2)).eval()
    model.save_pretrained(tmp_path)
    clip = torch.randn(1, 3, 4, 32, 32)
    with torch.no_grad():
        wanted = model(clip.transpose(1, 2), skip_predictor=True).last_hidden_state
    check(load_encoder(tmp_path), {"clip": (clip, wanted)})


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"model_type": "videomae"}, "model_type 'videomae'"),
        ({"hidden_act": "relu"}, "hidden_act: 'relu'"),
        ({"interpolate_rope": True}, "interpolate_rope: True.*give rope_variant= and interpolate_rope="),
    ],
)
def test_hugging_face_configurations_that_are_not_ours(tmp_path, changes, words):
    folder = hf_folder(tmp_path / "model", golden("fair_vjepa2")[0], **changes)
    with pytest.raises(CheckpointError, match=f"model.safetensors.*config.json.*{words}"):
        load_encoder(folder)
    if "interpolate_rope" in changes:
        assert load_encoder(folder, rope_variant="v2.1", interpolate_rope=True).rope_base


def released(name, **arch):
    """State dict of an encoder of a released size, without data."""
    state = build_encoder(name, device="meta", **arch).state_dict()
    return one_norm(state) if arch.get("levels") == 1 else state


ADDED = {"use_rope": False}
RELEASED = {  # (size, grid of a pos_embed, what is read, heads)
    "V-JEPA L 224": ("vit_large", (8, 14, 14), ADDED, 16),
    "V-JEPA H 224": ("vit_huge", (8, 14, 14), ADDED, 16),
    "V-JEPA H 384": ("vit_huge", (8, 24, 24), ADDED, 16),
    "V-JEPA of another size": ("vit_small", (8, 14, 14), ADDED, 6),
    "V-JEPA 2 L": ("vit_large", None, V2, 16),
    "V-JEPA 2 L, unused": ("vit_large", (8, 16, 16), V2, 16),
    "V-JEPA 2 H, unused": ("vit_huge", (8, 16, 16), V2, 16),
    "V-JEPA 2 g": ("vit_giant_xformers", None, V2, 22),
    "V-JEPA 2 g, unused": ("vit_giant_xformers", (8, 14, 14), V2, 22),
    "V-JEPA 2.1 B": ("vit_base", None, {}, 12),
    "V-JEPA 2.1 L": ("vit_large", None, {}, 16),
    "V-JEPA 2.1 g": ("vit_giant_xformers", None, {}, 22),
    "V-JEPA 2.1 G": ("vit_gigantic_xformers", None, {}, 26),
}


@pytest.mark.parametrize("case", RELEASED)
def test_released_models_need_no_flags(case):
    name, grid, wanted, heads = RELEASED[case]
    state = released(name, **({} if wanted == {} else V2))
    if grid:
        state["pos_embed"] = sincos_3d(SIZES[name].embed_dim, grid, True).bfloat16()
    reading = read_encoder(state, {}, Evidence(), Path("x.pt"))
    assert reading.text.startswith(re.match(r"V-JEPA( [\d.]+)?", case)[0]) and f"{heads} heads by its" in reading.text
    found = {"use_rope": True, "rope_variant": "v2.1", "interpolate_rope": True, **reading.arguments}
    assert wanted.items() <= found.items()
    if wanted == ADDED:
        assert (found["img_size"], found["num_frames"], found["uniform_power"]) == (16 * grid[1], 2 * grid[0], True)
        return
    right, got = (build_encoder(**a, device="meta") for a in ({"name": name, **wanted}, reading.arguments))
    for key in ("rope_base", "rope_variant", "use_rope", "num_heads", "levels", "img_temporal_dim_size"):
        assert getattr(got, key) == getattr(right, key), key
    assert {k: v.shape for k, v in got.state_dict().items()} == {k: v.shape for k, v in right.state_dict().items()}


def test_positions_that_fit_two_models():
    state = released("vit_large", **V2)
    state["pos_embed"] = sincos_3d(1024, (8, 16, 16), True)
    said = {"mask_tokens": 2}  # as in V-JEPA; the released V-JEPA 2 have 10
    with pytest.raises(CheckpointError, match="x.pt: fits two readings.*8 x 16 x 16.*use_rope=False.*use_rope=True"):
        read_encoder(state, {}, Evidence(**said), Path("x.pt"))
    for use_rope in (True, False):
        got = read_encoder(state, {"use_rope": use_rope}, Evidence(**said), Path("x.pt")).arguments
        assert got["use_rope"] == use_rope
    state["pos_embed"] = torch.randn(1, 2048, 1024)
    with pytest.raises(CheckpointError, match="not made of sines and cosines.*give img_size= and num_frames="):
        read_encoder(state, {}, Evidence(), Path("x.pt"))
    size = {"img_size": 256, "num_frames": 16}
    assert read_encoder(state, size, Evidence(), Path("x.pt")).arguments["use_rope"] is False
    state["pos_embed"] = torch.zeros(1, 2048, 1024)
    assert read_encoder(state, {}, Evidence(), Path("x.pt")).arguments["rope_variant"] == "v2"


def test_levels_without_modalities_ask_for_interpolation():
    state = released("vit_base", modality_embedding=False, img_temporal_dim_size=None)
    with pytest.raises(CheckpointError, match="fits two readings.*give interpolate_rope=True or False"):
        read_encoder(state, {}, Evidence(), Path("x.pt"))
    got = read_encoder(state, {"interpolate_rope": False}, Evidence(), Path("x.pt")).arguments
    assert got["rope_variant"] == "v2.1" and not got["interpolate_rope"]


@pytest.mark.parametrize("wide", [True, False])
def test_gated_feed_forward(tmp_path, wide):
    arch = dict(embed_dim=24, depth=4, num_heads=2, use_silu=True, wide_silu=wide, mlp_ratio=3.3)
    encoder = build_encoder(**arch)
    torch.save(encoder.state_dict(), tmp_path / "x.pt")
    with torch.no_grad():
        assert torch.equal(load_encoder(tmp_path / "x.pt", num_heads=2)(CLIP), encoder(CLIP))


def flat(prefix):
    return lambda state: {prefix + key: value for key, value in state.items()}


WRITTEN = {
    "one state dict": flat(""),
    "compiled": flat("_orig_mod."),
    "DDP of compiled": flat("module._orig_mod.backbone."),
    "blocks compiled": lambda s: {re.sub(r"^(blocks\.\d+\.)", r"\1_orig_mod.", k): v for k, v in s.items()},
    "FSDP": lambda s: {
        "_fsdp_wrapped_module."
        + re.sub(r"^(blocks\.\d+\.)", r"\1_fsdp_wrapped_module._checkpoint_wrapped_module.", k): v
        for k, v in s.items()
    },
    "Lightning": lambda s: {"state_dict": flat("model.")(s), "epoch": 1, "global_step": 7},
    "Lightning, networks": lambda s: {
        "state_dict": {**flat("model.encoder.backbone.")(s), "model.predictor.norm.weight": torch.ones(3)}
    },
    "student and teacher": lambda s: {
        **flat("encoder.")({k: v * 0 for k, v in s.items()}),
        **flat("target_encoder.")(s),
    },
    "DeepSpeed": lambda s: {"module": {"target_encoder": s}},
}


@pytest.mark.parametrize("written", WRITTEN)
def test_what_wrappers_put_before_names(written):
    own = from_fair(golden("fair_vjepa2")[0])
    state, hf_names = encoder_state(WRITTEN[written](own), "target_encoder", Path("x.pt"))
    assert state.keys() == own.keys() and all(torch.equal(state[key], own[key]) for key in own) and not hf_names


def test_plain_safetensors(tmp_path, tiny):
    save_file({key: value.clone() for key, value in one_norm(tiny.state_dict()).items()}, tmp_path / "x.safetensors")
    loaded = load_encoder(tmp_path / "x.safetensors")
    with torch.no_grad():
        assert torch.equal(loaded(CLIP), tiny(CLIP))
    with pytest.raises(CheckpointError, match="holds no 'encoder' weights.*which='target_encoder'"):
        load_encoder(tmp_path / "x.safetensors", "encoder")
    whole = (tmp_path / "x.safetensors").read_bytes()
    (tmp_path / "x.safetensors").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(CheckpointError, match="x.safetensors: cannot be read"):
        load_encoder(tmp_path / "x.safetensors")


def test_told_in_one_line_and_flags_win(tmp_path, tiny, caplog):
    (tmp_path / "config.json").write_text("not of this file")
    torch.save({"target_encoder": one_norm(tiny.state_dict()), "config": {"lr": 1e-3}}, tmp_path / "x.pt")
    with caplog.at_level(logging.INFO, "vjepa_fast"):
        loaded = load_encoder(tmp_path / "x.pt")
    assert [r.getMessage() for r in caplog.records] == [
        f"{tmp_path / 'x.pt'}: V-JEPA 2: vit_tiny, width 192, 12 blocks, 3 heads by its width, patches 2x16x16, "
        "1 level, RoPE in halves, not interpolated"
    ]
    assert loaded.clip_settings["crop_size"] is None and loaded.clip_settings["num_frames"] is None
    with torch.no_grad():
        assert torch.equal(loaded(CLIP), tiny(CLIP))
    caplog.clear()
    with caplog.at_level(logging.INFO, "vjepa_fast"):
        other = load_encoder(tmp_path / "x.pt", num_heads=6, rope_variant="v2.1", interpolate_rope=True, img_size=48)
    assert other.num_heads == 6 and other.rope_variant == "v2.1" and other.rope_base == 16
    assert other.clip_settings["crop_size"] == 48
    assert "RoPE in pairs, interpolated; given: img_size, interpolate_rope" in caplog.text


def test_flags_win_over_a_configuration(tmp_path, tiny):
    cfg = config.from_dict(
        {
            "data": {"crop_size": 32, "dataset_fpcs": [4], "datasets": ["a.csv"]},
            "model": {"model_name": "vit_tiny", **V2},
            "data_aug": {"mean": [0.1, 0.2, 0.3]},
        }
    )
    torch.save({"target_encoder": tiny.state_dict(), "config": config.to_dict(cfg)}, tmp_path / "x.pt")
    loaded = load_encoder(tmp_path / "x.pt", interpolate_rope=True, num_frames=8)
    assert loaded.rope_base == 16 and loaded.rope_variant == "v2" and loaded.clip_settings["num_frames"] == 8
    assert loaded.clip_settings["mean"] == (0.1, 0.2, 0.3) and loaded.clip_settings["crop_size"] == 32


def test_other_peoples_models_are_refused(tmp_path):
    own = from_fair(golden("fair_vjepa2")[0])
    conv = "patch_embed.proj.weight"
    without = {key: value for key, value in own.items() if key != "blocks.1.norm2.bias"}
    cases = [
        ({**own, conv: torch.ones(24, 3, 8, 8)}, r"weight is \[24, 3, 8, 8\].*\[width, 3, tubelet.*image ViT"),
        ({**own, "cls_token": torch.ones(1, 1, 24)}, r"cls_token \[1, 1, 24\].*another video transformer"),
        ({"fc.weight": torch.ones(2, 3)}, r"no patch_embed.proj.weight.*fc.weight \[2, 3\]"),
        (without, r"missing blocks.1.norm2.bias; likely width 24, 3 blocks, patches 2x8x8, 1 level"),
        ({**own, "head.weight": torch.ones(5, 24)}, "not expected head.weight; likely width 24"),
        ({**own, "blocks.1.norm1.bias": torch.ones(7)}, r"norm1.bias is \[7\] in the file, \[24\] in the model"),
        ({"_fsdp_wrapped_module._flat_param": torch.ones(9)}, "_flat_param.*save the full state dict"),
        ({**own, "module.norm.bias": own["norm.bias"]}, "two tensors have the name norm.bias"),
    ]
    for state, words in cases:
        torch.save(state, tmp_path / "x.pt")
        with pytest.raises(CheckpointError, match=f"^{tmp_path / 'x.pt'}: .*{words}") as caught:
            load_encoder(tmp_path / "x.pt", num_heads=2, rope_variant="v2")
        assert "\n" not in str(caught.value)
