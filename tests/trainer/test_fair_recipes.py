"""The YAML files of FAIR's V-JEPA 2 and 2.1, as facts in `goldens/fair_recipes.json`: each loads, its models are as
published, and a small step of it is made.
"""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
import yaml

from vjepa_fast import config as configs
from vjepa_fast.errors import ConfigError
from vjepa_fast.trainer import TrainStep, check, passes, starting
from vjepa_fast.trainer.schedules import Schedules

from .conftest import batch

FACTS = json.loads((Path(__file__).parents[1] / "goldens" / "fair_recipes.json").read_text())
FILES = [(app, name) for app in FACTS for name in FACTS[app]["runs"]]
COOLDOWNS = [(app, name) for app, name in FILES if "cooldown" in name]
# The same file at a size that a test can train.
SMALL = """data.crop_size=32 data.patch_size=8 data.dataset_fpcs=[4] data.batch_size=2 data.num_workers=0
data.datasets=[] data.datasets_weights=null data.fps=null model.model_name=vit_tiny model.embed_dim=48 model.depth=4
model.num_heads=2 model.pred_embed_dim=24 model.pred_depth=2 model.pred_num_heads=2 runtime.device=cpu
runtime.dtype=float32"""
IMAGES = "img_data.crop_size=32 img_data.patch_size=8 img_data.batch_size=2 img_data.datasets=[]"
BLOCKS = {"vitb16": 12, "vitl16": 24, "vith16": 32, "vitg16": 40, "vitG16": 48}


def published(app, name):
    """The file as nested sections."""
    nested = {}
    for key, value in {**FACTS[app]["base"], **FACTS[app]["runs"][name]}.items():
        *sections, last = key.split(".")
        node = nested
        for section in sections:
            node = node.setdefault(section, {})
        node[last] = value
    return nested


@pytest.fixture
def read(tmp_path):
    def read(values, *overrides):
        path = tmp_path / "published.yaml"
        path.write_text(yaml.safe_dump(values))
        return configs.load(path, overrides)

    return read


def small(app):
    return [*SMALL.split(), *(IMAGES.split() if app == "vjepa_2_1" else [])]


def test_there_are_15_files():
    assert [sum(app == a for a, _ in FILES) for app in FACTS] == [8, 7] and len(COOLDOWNS) == 8


@pytest.mark.parametrize(("app", "name"), FILES)
def test_its_models_at_full_size(read, app, name):
    cfg = read(published(app, name))
    found = check(cfg)
    new = app == "vjepa_2_1"
    encoder, predictor = found.encoder, found.predictor
    assert len(encoder.blocks) == BLOCKS[name.split("/")[0]] and encoder.levels == (4 if new else 1)
    assert len(predictor.predictor_blocks) == (12 if not new or "vitb" in name else 24)
    assert (encoder.rope_variant, encoder.rope_base) == (("v2.1", 16) if new else ("v2", None))
    assert list(cfg.objectives) == (["pred", "context"] if new else ["pred"])
    assert (cfg.img_data is not None) == new == encoder.modality_embedding
    frames, pixels = (64 if "64f" in name else 16), (384 if "384px" in name else 256)
    assert encoder.built_grid == (frames // 2, pixels // 16, pixels // 16)
    if new:
        context = cfg.objectives["context"]
        assert context["warmup"] == ([0, 0] if "cooldown" in name else [15000, 30000])
        assert context["weight_distance"] == ("pretrain" in name) and context["coeff"] == 0.5


@pytest.mark.parametrize(("app", "name"), FILES)
def test_a_small_step(read, app, name):
    cfg = read(published(app, name), *small(app), "init.path=null")
    step = TrainStep(cfg)
    before = [p.detach().clone() for p in step.encoder.parameters()]
    out = step(batch(size=2), 0)
    assert math.isfinite(out.loss) and list(out.terms) == list(cfg.objectives)
    assert any(not torch.equal(a, b) for a, b in zip(before, step.encoder.parameters()))


@pytest.mark.parametrize(("app", "name"), COOLDOWNS)
def test_a_cooldown_starts_from_its_checkpoint(read, tmp_path, app, name):
    values = published(app, name)
    pretrain = name.replace("cooldown", "pretrain").replace("384px", "256px").replace("64f", "16f")
    source = TrainStep(read(published(app, pretrain), *small(app)))
    source(batch(size=2), 0)
    torch.save({**source.state_dict(), "epoch": 1000}, tmp_path / "pretrained.pt")
    values["optimization"]["anneal_ckpt"] = str(tmp_path / "pretrained.pt")
    # the pretraining of 16 frames at 256 pixels, and here more of both
    cfg = read(values, *small(app), "data.crop_size=48", "data.dataset_fpcs=[8]")
    assert cfg.optimization.schedule == "linear" and cfg.init.optimizer
    step = TrainStep(cfg)
    lines = starting.take(cfg, step, None)
    assert [line.split(": ")[2] for line in lines] == ["taken"] * 4
    for part in ("encoder", "predictor", "target_encoder"):
        assert all(torch.equal(v, source.state_dict()[part][k]) for k, v in step.state_dict()[part].items())
    out = step(batch(size=2, frames=(8,), side=48), 0)
    assert math.isfinite(out.loss)


@pytest.mark.parametrize(("app", "name"), COOLDOWNS)
def test_the_learning_rate_of_a_cooldown(read, app, name):
    """Linear over ipe_scale = 1.25 times the run: it ends at a fifth of where it began."""
    schedules = Schedules.from_config(read(published(app, name), *small(app)))
    lr, steps = schedules.lrs[1], 120 if (app, name) == ("vjepa", "vitg16/cooldown-256px-64f") else 12000
    assert schedules.total_steps == steps
    assert schedules.lr(0) == pytest.approx(lr + (1e-6 - lr) / (1.25 * steps))
    assert schedules.lr(steps - 1) == pytest.approx(lr + (1e-6 - lr) * 0.8)
    assert schedules.lr(int(1.25 * steps) - 1) == schedules.lr(20000) == pytest.approx(1e-6)
    assert schedules.weight_decay(5000) == 0.04 and schedules.momentum(5000) == 0.99925


NOTES = [
    ({"is_anneal": False}, {}, {}, ""),
    ({}, {"load_checkpoint": False}, {}, "optimization.anneal_ckpt: not read, since meta.load_checkpoint is off"),
    ({}, {}, {"path": "pretrained.pt", "optimizer": True}, ""),
    ({"is_anneal": False}, {"read_checkpoint": "a.pt"}, {"path": "a.pt", "optimizer": True}, "begins at step 0"),
    ({"is_anneal": False}, {"pretrain_checkpoint": "a.pt"}, {"path": "a.pt"}, ""),
    (
        {"is_anneal": False},
        {"pretrain_checkpoint": "a.pt", "load_predictor": False},
        {"path": "a.pt", "predictor": "new"},
        "",
    ),
]


@pytest.mark.parametrize(("optimization", "meta", "init", "note"), NOTES)
def test_keys_that_name_weights(read, caplog, optimization, meta, init, note):
    values = published(*COOLDOWNS[0])
    values["optimization"] |= optimization
    values["meta"] |= meta
    cfg = read(values)
    wanted = {"path": None, "predictor": "auto", "optimizer": False, **init}
    assert configs.to_dict(cfg).get("init", configs.to_dict(configs.Config().init)) == wanted
    lines = [r.getMessage() for r in caplog.records if "without effect" not in r.getMessage()]
    assert len(lines) == bool(note) and note in "".join(lines)


def test_the_recipe_of_vit_b_is_the_published_file(read):
    values = published("vjepa_2_1", "vitb16/pretrain-256px-16f")
    ours, theirs = configs.to_dict(configs.load("vjepa21_vitb")), configs.to_dict(read(values))
    ours["data"]["datasets"] = theirs["data"]["datasets"]
    assert ours == {**theirs, "folder": "runs/vjepa21_vitb"}


@pytest.mark.parametrize(("name", "width"), [("vjepa21_vitb", 768), ("vjepa21_vits", 384), ("vjepa21_vitt", 192)])
def test_recipes_of_21(name, width):
    found = check(configs.load(name))
    assert found.encoder.embed_dim == width and found.encoder.levels == 4
    predictor = found.predictor
    assert (len(predictor.predictor_blocks), predictor.embed_dim, predictor.num_heads) == (12, 384, 12)
    assert math.isfinite(TrainStep(configs.load(name, small("vjepa_2_1")))(batch(size=2), 0).loss)


def test_without_ipe_an_epoch_is_one_pass(read, tmp_path, monkeypatch):
    (tmp_path / "a.csv").write_text("".join(f"{i}.mp4 0\n" for i in range(11)))
    (tmp_path / "b.csv").write_text("".join(f"{i}.mp4 0\n" for i in range(6)))
    values = published("vjepa", "vitl16/pretrain-256px-16f")
    values["optimization"]["ipe"] = None
    cfg = read(values, *SMALL.split(), f"data.datasets=[{tmp_path}/a.csv, {tmp_path}/b.csv]", "data.dataset_fpcs=[4]")
    assert cfg.optimization.ipe == 0 and check(cfg)
    assert passes.resolve(cfg).optimization.ipe == 8  # 17 samples, batches of 2
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert passes.resolve(cfg).optimization.ipe == 2
    monkeypatch.setenv("WORLD_SIZE", "9")
    with pytest.raises(ConfigError, match="whose 17 samples are fewer than a batch of 18"):
        passes.resolve(cfg)
    with pytest.raises(ConfigError, match="optimization.ipe: 0, a pass over the data"):
        Schedules.from_config(cfg)
    del values["optimization"]["ipe"]
    assert read(values).optimization.ipe == 0


def test_what_is_refused(read):
    for change, words in (
        (
            {"app": "vjepa_droid"},
            "app: 'vjepa_droid' is not read, only vjepa_2_1 and vjepa are; it trains a predictor of",
        ),
        ({"app": "vjepa2"}, "app: 'vjepa2' is not read"),
        ({"loss": {"loss_expp": 1}}, "loss.loss_expp: unknown key"),
    ):
        with pytest.raises(ConfigError, match=words):
            read({**published("vjepa", "vitl16/pretrain-256px-16f"), **change})
    values = published(*COOLDOWNS[0])
    del values["optimization"]["anneal_ckpt"]
    with pytest.raises(ConfigError, match="optimization.anneal_ckpt: missing; a cooldown"):
        read(values)


def test_mask_tokens_of_the_published_trainer(read, tmp_path):
    """It makes one per mask and data set and trains the first: the refusal says how a recipe takes them."""
    app, name = "vjepa", "vitl16/cooldown-256px-64f"
    values = published(app, name)
    source = TrainStep(read(values, *small(app), "model.num_mask_tokens=6", "init.path=null"))
    torch.save({**source.state_dict(), "epoch": 9}, tmp_path / "e.pt")
    values["optimization"]["anneal_ckpt"] = str(tmp_path / "e.pt")
    cfg = read(values, *small(app))
    with pytest.raises(Exception, match="has model.num_mask_tokens=6, model.mask_token_index=zero; or set init.pred"):
        starting.take(cfg, TrainStep(cfg), None)
    cfg = read(values, *small(app), "model.num_mask_tokens=6", "model.mask_token_index=zero")
    assert len(starting.take(cfg, TrainStep(cfg), None)) == 4
