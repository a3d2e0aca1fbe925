"""``init``: where a new run's weights come from, which parts are taken, and what is refused."""

from __future__ import annotations

import dataclasses
import json
import re

import pytest
import torch
from safetensors.torch import save_file

from vjepa_fast import config as configs
from vjepa_fast.errors import CheckpointError
from vjepa_fast.models import from_fair, to_fair
from vjepa_fast.trainer import TrainStep, starting

from .conftest import batch, config

V2 = dict(levels=1, modality_embedding=False, img_temporal_dim_size=None, rope_variant="v2", interpolate_rope=False)
SIZE = dict(embed_dim=192, depth=2, num_heads=3, pred_embed_dim=24, pred_depth=2, pred_num_heads=2)
PLAIN = {"pred": {}}


def cfg_of(path=None, *, init=None, **sections):
    return config(init={"path": None if path is None else str(path), **(init or {})}, **sections)


def vjepa2(**changes):
    """A tiny V-JEPA 2 recipe: one level, no context loss."""
    model = {**SIZE, **V2, "predict_all": False, "num_mask_tokens": 10, "mask_token_index": "zero", **changes}
    return {"model": model, "objectives": PLAIN}


def fair_content(step):
    """What FAIR's V-JEPA 2 code writes for these models."""
    names = ("encoder", "predictor", "target_encoder")
    content = {
        name: {re.sub(r"norms_block\.0\.", "norm.", k): v for k, v in step.state_dict()[name].items()} for name in names
    }
    return {**content, "opt": step.optimizer.state_dict(), "epoch": 3, "scaler": None, "lr": 1e-3}


def same(a, b):
    return all(torch.equal(a[key], b[key]) for key in a) and a.keys() == b.keys()


def moved(cfg, seed=1):
    """A step whose three networks differ from each other and from fresh ones."""
    step = TrainStep(dataclasses.replace(cfg, seed=seed))
    step(batch(), 0)
    for p in step.target_encoder.parameters():
        p.add_(0.01)
    return step


def heads_of(lines):
    return [re.match(r"init: ([\w ]+): ([\w ,]+):", line).group(1, 2) for line in lines]


ALL = [("encoder", "taken"), ("predictor", "taken"), ("target_encoder", "taken")]


@pytest.fixture(scope="module")
def fair(tmp_path_factory):
    step = moved(config(**vjepa2()))
    path = tmp_path_factory.mktemp("fair") / "vitx.pt"
    torch.save(fair_content(step), path)
    return path, step


def test_all_parts_of_a_fair_file(fair):
    path, source = fair
    cfg = cfg_of(path, **vjepa2())
    step = TrainStep(cfg)
    lines = starting.take(cfg, step, None)
    assert heads_of(lines) == ALL and all(str(path) in line for line in lines)
    for name in ("encoder", "predictor", "target_encoder"):
        assert same(step.state_dict()[name], source.state_dict()[name]), name
    assert starting.describe(cfg) == lines


def test_a_run_of_ours_with_its_heads(tmp_path):
    source = moved(config())
    content = {**source.state_dict(), "step": 7, "config": configs.to_dict(config())}
    (tmp_path / "checkpoints").mkdir()
    torch.save(content, tmp_path / "checkpoints" / "step-00000007.pt")
    cfg = cfg_of(tmp_path)
    step = TrainStep(cfg)
    lines = starting.take(cfg, step, None)
    assert heads_of(lines) == [*ALL, ("heads of the loss", "taken")] and "step 7 of a run" in lines[0]
    assert same(step.state_dict()["heads"], source.state_dict()["heads"])
    other = cfg_of(tmp_path, objectives={"pred": {}, "ld": {"hidden_dim": 4}})
    assert heads_of(starting.take(other, TrainStep(other), None))[-1] == ("heads of the loss", "new")


def hugging_face(folder, step):
    """A VJEPA2Model folder of these models."""
    found = {}
    for network, state in (("encoder", step.target_encoder.state_dict()), ("predictor", step.predictor.state_dict())):
        for key, value in state.items():
            name = re.sub(r"^(predictor_)?blocks\.", "layer.", key).replace("attn.", "attention.")
            name = re.sub(r"^(norms_block\.0|predictor_norm)\.", "layernorm.", name)
            name = name.replace("patch_embed.", "embeddings.patch_embeddings.").replace("predictor_proj.", "proj.")
            name = name.replace("predictor_embed.", "embeddings.predictor_embeddings.")
            if "qkv" in name:
                found |= {f"{network}.{name.replace('qkv', p)}": v.clone() for p, v in zip(PARTS, value.chunk(3))}
            elif not name.startswith("mask_tokens"):
                found[f"{network}.{name}"] = value.clone()
    found["predictor.embeddings.mask_tokens"] = torch.stack([t.detach() for t in step.predictor.mask_tokens])
    folder.mkdir()
    save_file(found, folder / "model.safetensors")
    heads = {"num_attention_heads": 3, "pred_num_attention_heads": 2}
    (folder / "config.json").write_text(json.dumps({"model_type": "vjepa2", **heads}))
    return folder


PARTS = ("query", "key", "value")


def test_a_hugging_face_folder(tmp_path):
    source = moved(config(**vjepa2()))
    cfg = cfg_of(hugging_face(tmp_path / "hf", source), **vjepa2())
    step = TrainStep(cfg)
    lines = starting.take(cfg, step, None)
    assert heads_of(lines) == ALL and "which holds no encoder" in lines[0]
    assert same(step.encoder.state_dict(), source.target_encoder.state_dict())
    assert same(step.predictor.state_dict(), source.predictor.state_dict())
    wrong = cfg_of(tmp_path / "hf", **vjepa2(pred_num_heads=4))
    lines = starting.take(wrong, TrainStep(wrong), None)
    assert "predictor: refused" in lines[1] and "model.pred_num_heads=2" in lines[1]


def test_one_encoder_alone(tmp_path):
    source = moved(config(**vjepa2()))
    torch.save(source.encoder.state_dict(), tmp_path / "x.pt")
    cfg = cfg_of(tmp_path / "x.pt", **vjepa2())
    step = TrainStep(cfg)
    fresh = {k: v.clone() for k, v in step.predictor.state_dict().items()}
    lines = starting.take(cfg, step, None)
    assert heads_of(lines) == [ALL[0], ("predictor", "new"), ALL[2]] and "holds none" in lines[1]
    assert same(step.predictor.state_dict(), fresh)
    assert same(step.target_encoder.state_dict(), source.encoder.state_dict())


def test_a_predictor_that_does_not_fit_is_left_out_whole(fair):
    path, source = fair
    cfg = cfg_of(path, **vjepa2(num_mask_tokens=2, pred_depth=1))
    step = TrainStep(cfg)
    fresh = {k: v.clone() for k, v in step.predictor.state_dict().items()}
    line = starting.take(cfg, step, None)[1]
    assert re.match(
        rf"init: predictor: refused, starts new: {path}: not expected mask_tokens.2; .*and \d+ more; ", line
    )
    assert "likely width 24, 2 blocks, 10 mask tokens, 192 channels out" in line
    assert "a recipe that takes it has model.pred_depth=2, model.num_mask_tokens=10" in line
    assert same(step.predictor.state_dict(), fresh) and same(step.encoder.state_dict(), source.encoder.state_dict())
    again = dataclasses.replace(cfg, init=dataclasses.replace(cfg.init, predictor="required"))
    with pytest.raises(CheckpointError, match=r"predictor: .*or set init.predictor=auto"):
        starting.take(again, TrainStep(again), None)
    new = dataclasses.replace(cfg, init=dataclasses.replace(cfg.init, predictor="new"))
    assert "predictor: new: as init.predictor says" in starting.take(new, TrainStep(new), None)[1]


REFUSED = [
    (
        dict(levels=2),
        r"missing norms_block.1.weight; .*; likely width 192, 2 blocks, .* 1 level; a recipe .* model.levels=1$",
    ),
    (
        dict(embed_dim=96),
        r"patch_embed.proj.weight is \[192, 3, 2, 8, 8\] in the file, \[96, 3, 2, 8, 8\] in .*likely width 192, 2",
    ),
    (dict(depth=3), r"missing blocks.2.norm1.weight.*model.depth=2"),
    (dict(img_temporal_dim_size=1), r"missing patch_embed_img.*model.img_temporal_dim_size=null"),
]


@pytest.mark.parametrize(("changes", "words"), REFUSED)
def test_an_encoder_that_does_not_fit_stops_the_run(fair, changes, words):
    path, _ = fair
    cfg = cfg_of(path, **vjepa2(**changes))
    step = TrainStep(cfg)
    before = {k: v.clone() for k, v in step.encoder.state_dict().items()}
    with pytest.raises(CheckpointError, match=rf"^{path}: (target_)?encoder: .*{words}") as caught:
        starting.take(cfg, step, None)
    assert "\n" not in str(caught.value) and same(step.encoder.state_dict(), before)
    (note,) = starting.describe(cfg)
    assert note == f"train would refuse init.path: {caught.value}"


@pytest.fixture(scope="module")
def released(tmp_path_factory):
    """ViT-tiny of V-JEPA 2: a size that FAIR's code names, so its heads and positions are known."""
    path = tmp_path_factory.mktemp("released") / "vitt.pt"
    torch.save(fair_content(TrainStep(config(**vjepa2(depth=12)))), path)
    return path


@pytest.mark.parametrize(
    ("changes", "setting"),
    [
        (dict(rope_variant="v2.1"), "model.rope_variant=v2$"),
        (dict(interpolate_rope=True), "model.interpolate_rope=false$"),
        (dict(num_heads=6), "model.model_name=vit_tiny$"),
        (dict(use_rope=False), "missing pos_embed.*model.use_rope=true, model.rope_variant=v2"),
    ],
)
def test_what_no_shape_shows(released, changes, setting):
    cfg = cfg_of(released, **vjepa2(**{"depth": 12, **changes}))
    with pytest.raises(CheckpointError, match=setting) as caught:
        starting.take(cfg, TrainStep(cfg), None)
    assert ("every tensor fits" in str(caught.value)) == ("use_rope" not in changes)


def test_positions_of_another_grid_are_computed(tmp_path):
    """V-JEPA adds sines and cosines of its grid: another crop and clip length have others."""
    flat = {**vjepa2(), "data": {"crop_size": 32, "dataset_fpcs": (4,)}}
    flat["model"] = {**flat["model"], "use_rope": False}
    torch.save(fair_content(moved(config(**flat))), tmp_path / "v1.pt")
    cfg = cfg_of(tmp_path / "v1.pt", **{**flat, "data": {"crop_size": 48, "dataset_fpcs": (8,)}})
    step = TrainStep(cfg)
    own = step.encoder.pos_embed.clone(), step.predictor.predictor_pos_embed.clone()
    assert heads_of(starting.take(cfg, step, None)) == ALL
    assert torch.equal(step.encoder.pos_embed, own[0]) and torch.equal(step.predictor.predictor_pos_embed, own[1])


def test_moments_of_another_run(fair, tmp_path):
    path, source = fair
    cfg = cfg_of(path, init={"optimizer": True}, **vjepa2())
    step = TrainStep(cfg)
    lines = starting.take(cfg, step, None)
    assert lines[-1] == f"init: optimizer: taken: the moments of AdamW in {path}"
    wanted, got = source.optimizer.state_dict(), step.optimizer.state_dict()
    assert all(same(wanted["state"][i], got["state"][i]) for i in wanted["state"])
    step(batch(), 0)  # its groups are still those of this run
    content = torch.load(path)
    for wrong, words in (
        ({**content, "opt": {}}, "opt: holds no optimiser state; set init.optimizer=false"),
        ({k: v for k, v in content.items() if k != "predictor"}, "holds no predictor; set init.predictor=auto"),
    ):
        torch.save(wrong, tmp_path / "w.pt")
        other = dataclasses.replace(cfg, init=dataclasses.replace(cfg.init, path=str(tmp_path / "w.pt")))
        with pytest.raises(CheckpointError, match=words):
            starting.take(other, TrainStep(other), None)
    state = source.optimizer.state_dict()
    state["state"][0]["exp_avg"] = torch.zeros(3)
    torch.save({**content, "opt": state}, tmp_path / "w.pt")
    with pytest.raises(CheckpointError, match=r"opt: moments of \[3\] for a parameter of \[192, 3, 2, 8, 8\]"):
        starting.take(other, TrainStep(other), None)


def test_an_online_target_is_the_encoder(fair):
    path, source = fair
    cfg = cfg_of(path, target={"mode": "online", "stop_gradient": False}, **vjepa2())
    step = TrainStep(cfg)
    lines = starting.take(cfg, step, None)
    assert "target_encoder: taken: it is the encoder" in lines[2]
    assert same(from_fair(to_fair(step.encoder.state_dict())), source.encoder.state_dict())


def test_the_low_copy_follows(fair):
    path, source = fair
    cfg = cfg_of(path, **vjepa2())
    step = TrainStep(cfg, dtype=torch.bfloat16)
    starting.take(cfg, step, None)
    for low, full in zip(step.low.low, step.low.full):
        assert torch.equal(low, full.bfloat16())
