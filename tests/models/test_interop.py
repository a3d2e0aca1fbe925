from __future__ import annotations

import pickle

import pytest
import torch

from vjepa_fast import config
from vjepa_fast.errors import CheckpointError
from vjepa_fast.models import build_encoder, build_from_config, from_fair, interop, load_encoder, load_weights, to_fair

DATA = {"crop_size": 32, "patch_size": 8, "dataset_fpcs": [4], "datasets": ["a.csv"], "frame_sample_rate": 3}
MODEL = {"embed_dim": 24, "depth": 4, "num_heads": 2, "pred_embed_dim": 12, "pred_depth": 2, "pred_num_heads": 2}
ARCH = dict(embed_dim=24, depth=4, num_heads=2, img_size=32, patch_size=8, num_frames=4)
CLIP = torch.randn(2, 3, 4, 32, 32, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def cfg():
    return config.from_dict({"data": DATA, "model": MODEL, "data_aug": {"mean": [0.1, 0.2, 0.3]}})


@pytest.fixture
def run(tmp_path, cfg):
    """A run folder with two checkpoints; returns (folder, encoder, target) of the newest."""
    folder = tmp_path / "run"
    (folder / "checkpoints").mkdir(parents=True)
    for step in (9, 10):
        torch.manual_seed(step)
        encoder, predictor = build_from_config(cfg)
        target, _ = build_from_config(cfg)
        content = {
            "encoder": to_fair(encoder.state_dict()),
            "predictor": to_fair(predictor.state_dict()),
            "target_encoder": to_fair(target.state_dict()),
            "heads": {},
            "opt": {},
            "epoch": 0,
            "step": step,
            "config": config.to_dict(cfg),
            "versions": {"torch": str(torch.__version__)},
        }
        torch.save(content, folder / "checkpoints" / f"step-{step:08d}.pt")
    return folder, encoder, target


def one_line(caught):
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_names(small):
    state = small().state_dict()
    fair = to_fair(state)
    assert all(key.startswith("module.backbone.") for key in fair)
    assert list(from_fair(fair)) == list(state) == list(from_fair(state))
    assert list(to_fair(fair)) == list(fair)  # not prefixed twice
    assert list(from_fair({"module._orig_mod.backbone.blocks.0.module.x": 0})) == ["blocks.0.module.x"]


@pytest.mark.parametrize("which", ["target_encoder", "encoder"])
def test_round_trip(run, which):
    folder, encoder, target = run
    wanted = target if which == "target_encoder" else encoder
    loaded = load_encoder(folder, which)  # newest
    assert not loaded.training and not any(p.requires_grad for p in loaded.parameters())
    with torch.no_grad():
        assert torch.equal(loaded(CLIP), wanted(CLIP))
    file = folder / "checkpoints" / "step-00000010.pt"
    same, older = load_encoder(file, which), load_encoder(folder / "checkpoints" / "step-00000009.pt", which)
    assert same.checkpoint_hash == loaded.checkpoint_hash != older.checkpoint_hash
    assert len(loaded.checkpoint_hash) == 64


def test_clip_settings(run):
    settings = load_encoder(run[0]).clip_settings
    assert settings == {
        "crop_size": 32,
        "num_frames": 4,
        "frame_step": 3,
        "fps": None,
        "duration": None,
        "mean": (0.1, 0.2, 0.3),
        "std": (0.229, 0.224, 0.225),
        "tubelet_size": 2,
        "patch_size": 8,
    }


def test_fair_file(tmp_path, small):
    encoder = small()
    path = tmp_path / "fair.pt"
    torch.save({"encoder": {}, "ema_encoder": to_fair(encoder.state_dict()), "epoch": 3}, path)
    loaded = load_encoder(path, **ARCH)
    with torch.no_grad():
        assert torch.equal(loaded(CLIP), encoder(CLIP))
    assert loaded.clip_settings["num_frames"] == 4 and loaded.clip_settings["frame_step"] is None
    by_config = load_encoder(path, config=config.from_dict({"data": DATA, "model": MODEL}))
    assert by_config.checkpoint_hash == loaded.checkpoint_hash
    with pytest.raises(CheckpointError, match="no released model has width 24; give num_heads="):
        load_encoder(path)


def test_old_zipless_file(tmp_path, small):
    path = tmp_path / "old.pt"
    torch.save({"encoder": small().state_dict()}, path, _use_new_zipfile_serialization=False)
    load_encoder(path, "encoder", **ARCH)


def test_vjepa2_file_with_one_norm_and_unused_positions(tmp_path, small):
    arch = dict(ARCH, levels=1, modality_embedding=False, img_temporal_dim_size=None, rope_variant="v2")
    encoder = small(**{**arch, "interpolate_rope": False})  # which that variant has never been trained with
    state = {key.replace("norms_block.0", "norm"): value for key, value in encoder.state_dict().items()}
    assert "norm.weight" in state
    path = tmp_path / "vjepa2.pt"
    torch.save({"target_encoder": to_fair({**state, "pos_embed": torch.zeros(1, 32, 24)})}, path)
    with torch.no_grad():
        assert torch.equal(load_encoder(path, **arch)(CLIP), encoder(CLIP))


@pytest.mark.parametrize("damage", ["truncated", "text", "empty", "flipped"])
def test_damaged_file(run, damage):
    file = run[0] / "checkpoints" / "step-00000010.pt"
    content = file.read_bytes()
    file.write_bytes(
        {
            "truncated": content[: len(content) // 2],
            "text": b"not a checkpoint\n",
            "empty": b"",
            "flipped": content[:30] + bytes(255 - b for b in content[30:4000]) + content[4000:],
        }[damage]
    )
    with pytest.raises(CheckpointError) as caught:
        load_encoder(run[0])
    assert str(file) in one_line(caught)


def test_a_checkpoint_runs_no_code(tmp_path):
    class Evil:
        def __reduce__(self):
            return (open, (str(tmp_path / "ran"), "w"))

    path = tmp_path / "evil.pt"
    torch.save({"target_encoder": Evil()}, path)
    with pytest.raises(CheckpointError) as caught:
        load_encoder(path, **ARCH)
    assert "more than tensors and plain values (io.open): not loaded" in one_line(caught)
    path.write_bytes(pickle.dumps(Evil()))
    with pytest.raises(CheckpointError):
        load_encoder(path, **ARCH)
    assert not (tmp_path / "ran").exists()


def test_missing_files(tmp_path):
    with pytest.raises(CheckpointError, match="nowhere.pt: no such checkpoint file"):
        load_encoder(tmp_path / "nowhere.pt")
    with pytest.raises(CheckpointError, match="no checkpoints/step-\\*.pt in this folder; train first"):
        load_encoder(tmp_path)


def test_no_such_encoder_inside(tmp_path):
    path = tmp_path / "heads.pt"
    torch.save({"heads": {}, "step": 4, "target_encoder": None}, path)
    with pytest.raises(CheckpointError) as caught:
        load_encoder(path, **ARCH)
    assert "holds no 'target_encoder' weights (it holds: heads, step, target_encoder)" in one_line(caught)
    torch.save([1, 2], path)
    with pytest.raises(CheckpointError, match="holds a list"):
        load_encoder(path, **ARCH)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(embed_dim=36), "img_mod_embed is .1, 1, 24. in the file, .1, 1, 36. in the model"),
        (dict(depth=5), "missing blocks.4.norm1.weight"),
        (dict(levels=3), "not expected norms_block.3.weight"),
        (
            dict(patch_size=16),
            "patch_embed.proj.weight is .24, 3, 2, 8, 8. in the file, .24, 3, 2, 16, 16. in the model",
        ),
    ],
)
def test_another_architecture(run, change, message):
    file = run[0] / "checkpoints" / "step-00000010.pt"
    with pytest.raises(CheckpointError, match=message) as caught:
        load_encoder(file, **{**ARCH, **change})
    assert f"{file}: checkpoint of another architecture" in one_line(caught)


def test_nothing_is_loaded_from_a_misfit():
    model = build_encoder(**ARCH)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    state = {key: value + 1 for key, value in before.items()}
    del state["blocks.3.mlp.fc2.bias"]
    with pytest.raises(CheckpointError, match="missing blocks.3.mlp.fc2.bias"):
        load_weights(model, state, "x.pt")
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_unknown_which(run):
    with pytest.raises(ValueError, match="which: expected 'target_encoder' or 'encoder'"):
        load_encoder(run[0], "predictor")


def test_hashes_of_weights_stay_what_they_were():
    """Results and feature caches on disk are bound to them."""
    layer = torch.nn.Linear(2, 1)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([[1.0, -2.0]])), layer.bias.fill_(0.5)
    assert interop.hash_weights(layer)[:16] == "5bee5173448bc00a"
    assert interop.encoder_hash(layer)[:16] == "beb3e68d7b63564a"
    layer.checkpoint_hash = "abc"
    assert interop.encoder_hash(layer.bfloat16())[:16] == "2a589e05fbcead23"
