"""The published YAML, read unchanged: all runs of the study, and the fuller format of the FAIR app."""

import copy
import json
import logging
from pathlib import Path

import pytest
import yaml

from vjepa_fast import config
from vjepa_fast.errors import ConfigError

FACTS = json.loads((Path(__file__).parent.parent / "goldens" / "published_recipes.json").read_text())
RUNS = sorted(FACTS["runs"])


def published(name):
    """The published file of one run: the base, what differs, and null for keys that it does not have."""
    flat = dict(FACTS["base"])
    for key, value in FACTS["runs"][name].items():
        if value is None:
            flat.pop(key, None)
        else:
            flat[key] = value
    out = {}
    for key, value in flat.items():
        *sections, last = key.split(".")
        node = out
        for section in sections:
            node = node.setdefault(section, {})
        node[last] = copy.deepcopy(value)
    out["data"]["datasets"] = [f"{name}.csv" for name in out["data"]["datasets"]]
    out["folder"] = f"runs/{name}"
    return out


@pytest.fixture
def read(tmp_path):
    def read(values, *overrides):
        path = tmp_path / "published.yaml"
        path.write_text(yaml.safe_dump(values))
        return config.load(path, overrides)

    return read


@pytest.fixture
def refused(read):
    def refused(values):
        with pytest.raises(ConfigError) as info:
            read(values)
        assert "\n" not in str(info.value) and "published.yaml: " in str(info.value)
        return str(info.value)

    return refused


def test_there_are_35_runs():
    assert len(RUNS) == 35


@pytest.mark.parametrize("name", RUNS)
def test_recipe_equals_published_file(read, name):
    assert config.load(name) == read(published(name))


@pytest.mark.parametrize("name", RUNS)
def test_coefficients_arrive_where_the_published_file_has_them(read, name):
    """Checked from the facts alone, without the importer's own tables."""
    values = published(name)
    given = values["optimization"]
    cfg = read(values)
    on = {key.removesuffix("_coeff"): v for key, v in given.items() if key.endswith("_coeff") and v}
    assert set(cfg.objectives) == {"pred", "context", *on}
    for term, coeff in on.items():
        fields = cfg.objectives[term]
        assert fields["coeff"] == coeff
        own = {k.removeprefix(f"{term}_"): v for k, v in given.items() if k.startswith(f"{term}_")}
        assert {k: fields[k] for k in own} == own
    fwm = "fwm_static" in on
    for term in {"ld", "ac"} & set(on):
        assert cfg.objectives[term].get("channels") == ("dynamics" if fwm else None)
    if "ld" in on:
        assert cfg.objectives["ld"].get("hard_weighting") == (given["hw_temp"] if "hw" in on else None)
    assert cfg.objectives["context"] == {
        "coeff": 0.5,
        "loss_exp": 1.0,
        "warmup": [15000, 30000],
        "weight_distance": True,
        "offset": False,
    }
    assert cfg.target.mode == ("online" if given["disable_ema"] else "ema")
    assert cfg.seed == values["meta"]["seed"] and cfg.folder == values["folder"] and cfg.compat == "intended"
    assert cfg.runtime.dtype == "bfloat16"
    for key in ("crop_size", "fps", "frame_sample_rate", "batch_size"):
        assert getattr(cfg.data, key) == values["data"].get(key)
    for spec, mask in zip(cfg.masks.specs, values["mask"], strict=True):
        for key, value in mask.items():
            assert getattr(spec, key) == (tuple(value) if isinstance(value, list) else value)
    assert len(cfg.masks.specs) == 2


def test_keys_without_effect_are_named_in_one_line(read, caplog):
    with caplog.at_level(logging.WARNING, logger="vjepa_fast"):
        read(published("mixed_4gpu_baseline"))
    (record,) = caplog.records
    message = record.getMessage()
    assert "\n" not in message
    for key in (
        "nodes",
        "mem_per_gpu",
        "data.dataset_type",
        "data_aug.reprob",
        "loss.shift_by_n",
        "meta.eval_freq",
        "model.n_registers",
        "optimization.kinematic_coeff",
    ):
        assert key in message
    for key in ("optimization.lr", "data.crop_size", "model.pred_depth", "loss.loss_exp", "meta.seed"):
        assert key not in message


def test_overrides_use_our_keys(read):
    cfg = read(published("mixed_4gpu_fwm_hw_ld"), "compat=published", "data.crop_size=64", "objectives.ld.coeff=2")
    assert (cfg.compat, cfg.data.crop_size, cfg.objectives["ld"]["coeff"]) == ("published", 64, 2)


def test_image_stream_of_the_fair_format(read):
    """A share of the ranks reads images: here every process reads that share of the batch."""
    values = published("mixed_4gpu_baseline")
    values["img_data"] = {
        "batch_size": 72,
        "crop_size": 256,
        "dataset_fpcs": [1],
        "dataset_type": "VideoDataset",
        "datasets": ["images.csv"],
        "datasets_weights": [1.0],
        "rank_ratio": 0.5,
    }
    values["img_mask"] = [{**values["mask"][0], "num_blocks": 10}]
    values["model"]["lambda_value_img"] = 0.7
    values["optimization"].update(is_anneal=False, ipe_scale=1.25, betas=[0.9, 0.95])
    cfg = read(values)
    images = cfg.img_data
    assert (images.batch_size, images.crop_size, images.dataset_fpcs, images.tubelet_size) == (36, 256, (1,), 1)
    assert images.datasets == ("images.csv",) and images.patch_size == 16
    assert [m.num_blocks for m in cfg.img_masks.specs] == [10]
    assert cfg.objectives["context"]["coeff_img"] == 0.7 and cfg.objectives["context"]["coeff"] == 0.5
    assert cfg.optimization.ipe_scale == 1.25 and cfg.optimization.betas == (0.9, 0.95)


@pytest.mark.parametrize(
    ("ratio", "batch", "images", "warned"),
    [
        (0.5, 72, 36, []),
        (0.25, 72, 18, ["on the weight of images"]),
        (0.5, 1, 1, ["rounds to 1; give img_data.batch_size 2"]),
    ],
)
def test_a_rank_ratio_without_effect_warns(read, caplog, ratio, batch, images, warned):
    values = published("mixed_4gpu_baseline")
    section = {"batch_size": batch, "crop_size": 256, "dataset_fpcs": [1], "datasets": ["i.csv"], "rank_ratio": ratio}
    values["img_data"] = section
    assert read(values).img_data.batch_size == images
    lines = [r.getMessage() for r in caplog.records if "img_data.rank_ratio" in r.getMessage()]
    assert len(lines) == len(warned) and all(part in line for part, line in zip(warned, lines))


def test_constant_context_weight_and_loss_exponent(read):
    values = published("mixed_4gpu_hw")
    values["model"]["lambda_progressive"] = False
    values["loss"].update(loss_exp=2.0, offset_context_loss=True)
    terms = read(values).objectives
    assert terms["context"] == {
        "coeff": 0.5,
        "loss_exp": 2.0,
        "warmup": [0, 0],
        "weight_distance": True,
        "offset": True,
    }
    assert terms["pred"] == {"loss_exp": 2.0} and terms["hw"]["loss_exp"] == 2.0


def test_without_all_token_prediction_there_is_no_context_term(read):
    values = published("mixed_4gpu_baseline")
    values["loss"]["predict_all"] = False
    cfg = read(values)
    assert cfg.objectives == {"pred": {"loss_exp": 1.0}} and not cfg.model.predict_all


def test_absent_keys_take_the_published_defaults(read):
    values = published("mixed_4gpu_baseline")
    for key in (
        "use_rope",
        "interpolate_rope",
        "modality_embedding",
        "img_temporal_dim_size",
        "uniform_power",
        "use_activation_checkpointing",
        "pred_num_heads",
    ):
        del values["model"][key]
    values["model"]["pred_embed_dim"] = 384
    cfg = read(values)
    assert not (cfg.model.use_rope or cfg.model.interpolate_rope or cfg.model.modality_embedding)
    assert cfg.model.img_temporal_dim_size is None and not cfg.model.uniform_power
    assert cfg.model.pred_num_heads == 12  # the encoder's


@pytest.mark.parametrize(
    ("section", "key", "value", "expected"),
    [
        ("optimization", "lrr", 1.0, "optimization.lrr: unknown key; accepted: epochs"),
        ("optimization", "hw_coef", 1.0, "did you mean hw_coeff?"),
        ("model", "pred_dept", 8, "model.pred_dept: unknown key; accepted: model_name"),
        ("data", "clip_len", 8, "data.clip_len: unknown key"),
        (None, "optimisation", {}, "optimisation: unknown key; accepted: app"),
        (None, "app", "vjepa2", "app: 'vjepa2' is not read, only vjepa_2_1 and vjepa are"),
        (None, "optimization", None, "optimization: missing"),
        (None, "mask", None, "mask: missing"),
        ("optimization", "hw_coeff", "big", "optimization.hw_coeff: expected a number, got 'big'"),
        ("optimization", "disable_ema", 1, "optimization.disable_ema: expected true or false, got 1"),
        ("optimization", "epochs", None, "optimization.epochs: missing"),
        ("optimization", "ema", 0.9, "optimization.ema: expected a list of 2"),
        ("optimization", "is_anneal", True, "optimization.anneal_ckpt: missing; a cooldown"),
        ("optimization", "is_anneal", 1, "optimization.is_anneal: expected true or false, got 1"),
        ("data_aug", "auto_augment", True, "data_aug.auto_augment: True is not supported; only False is"),
        ("model", "n_registers", 4, "model.n_registers: 4 is not supported; only 0 is"),
        ("meta", "load_checkpoint", "a.pt", "meta.load_checkpoint: expected true or false, got 'a.pt'"),
        ("meta", "dtype", "float8", "meta.dtype: 'float8' is not supported; accepted: bfloat16, float16, float32"),
        ("meta", "seed", "x", "meta.seed: expected an integer, got 'x'"),
        ("data", "crop_size", "wide", "data.crop_size: expected an integer, got 'wide'"),
    ],
)
def test_bad_published_key_is_refused(refused, section, key, value, expected):
    values = published("mixed_4gpu_baseline")
    (values if section is None else values[section])[key] = value
    assert expected in refused(values)


def test_bad_mask_is_refused_by_its_published_name(refused):
    values = published("mixed_4gpu_baseline")
    values["mask"][1]["blocks"] = 3
    assert "mask.1.blocks: unknown key; accepted: num_blocks" in refused(values)
    del values["mask"][1]["blocks"]
    values["mask"][1]["num_blocks"] = "two"
    assert ": mask.1.num_blocks: expected an integer, got 'two'" in refused(values)
    del values["mask"][1]["num_blocks"]
    assert "mask.1.num_blocks: missing" in refused(values)


def test_the_loss_regulation_is_the_skipping_of_spikes(read, refused, caplog):
    values = published(RUNS[0])
    values["optimization"] |= {"loss_reg_std_mult": 4, "loss_reg_num_tracking_steps": 200, "loss_reg_min_epoch": 7}
    with caplog.at_level(logging.WARNING, "vjepa_fast"):
        found = read(values).optimization
    assert (found.spike_std, found.spike_window, found.spike_after_epoch, found.max_spikes) == (4.0, 200, 7, 10)
    assert "optimization.loss_reg" not in caplog.text
    del values["optimization"]["loss_reg_num_tracking_steps"], values["optimization"]["loss_reg_min_epoch"]
    found = read(values).optimization
    assert (found.spike_std, found.spike_window, found.spike_after_epoch) == (4.0, 300, 50)
    values["optimization"] |= {"loss_reg_num_tracking_steps": "many"}
    assert "optimization.loss_reg_num_tracking_steps: " in refused(values)
    values["optimization"] |= {"loss_reg_std_mult": None, "loss_reg_num_tracking_steps": 200}
    with caplog.at_level(logging.WARNING, "vjepa_fast"):
        assert read(values).optimization.spike_std is None
    assert "optimization.loss_reg_std_mult, optimization.loss_reg_num_tracking_steps" in caplog.text
