"""config.load: typed values, overrides, inheritance, and refusals in one line."""

import dataclasses

import pytest

from vjepa_fast import config
from vjepa_fast.errors import ConfigError

SMALL = """
data: {datasets: [train.csv], crop_size: 64}
optimization: {lr: 3e-4, epochs: 2}
objectives:
  pred: {}
  hw: {coeff: 3e-1}
"""


@pytest.fixture
def small(tmp_path):
    path = tmp_path / "small.yaml"
    path.write_text(SMALL)
    return path


def refused(path, *overrides):
    with pytest.raises(ConfigError) as info:
        config.load(path, overrides)
    message = str(info.value)
    assert "\n" not in message
    return message


def test_values_are_typed(small):
    cfg = config.load(small)
    assert cfg.optimization.lr == 3e-4 and isinstance(cfg.optimization.lr, float)
    assert cfg.objectives == {"pred": {}, "hw": {"coeff": 0.3}}
    assert cfg.data.datasets == ("train.csv",)
    assert cfg.masks.specs == (config.MaskConfig(), config.MaskConfig(num_blocks=2, spatial_scale=(0.7, 0.7)))
    with pytest.raises(dataclasses.FrozenInstanceError):
        cfg.seed = 1


@pytest.mark.parametrize(
    ("text", "path", "value"),
    [
        ("optimization.lr=1e-3", "optimization.lr", 1e-3),
        ("optimization.warmup=2", "optimization.warmup", 2.0),
        ("masks.specs.1.num_blocks=4", "masks.specs.1.num_blocks", 4),
        ("masks.specs.0.spatial_scale=[0.1, 0.2]", "masks.specs.0.spatial_scale", (0.1, 0.2)),
        ("masks.specs.0.spatial_scale.1=0.3", "masks.specs.0.spatial_scale", (0.15, 0.3)),
        ("data.datasets=[a.csv, b.csv]", "data.datasets", ("a.csv", "b.csv")),
        ("data.datasets=a.csv", "data.datasets", ("a.csv",)),
        ("data.fps=8", "data.fps", 8),
        ("data.datasets_weights=null", "data.datasets_weights", None),
        ("loss.context_warmup=[10, 20]", "loss.context_warmup", (10, 20)),
        ("loss.context_warmup=[0.1, 1.0]", "loss.context_warmup", (0.1, 1.0)),
        ("objectives.hw.coeff=0.5", "objectives", {"pred": {}, "hw": {"coeff": 0.5}}),
        ("objectives.ltc.margin=0.2", "objectives", {"pred": {}, "hw": {"coeff": 0.3}, "ltc": {"margin": 0.2}}),
        ("objectives.delta={}", "objectives", {"pred": {}, "hw": {"coeff": 0.3}, "delta": {}}),
        ("objectives.hw=null", "objectives", {"pred": {}}),
        ("folder=a=b", "folder", "a=b"),
        ("folder=2024", "folder", "2024"),
        ("runtime.compile=true", "runtime.compile", True),
        ("runtime.compile=blocks", "runtime.compile", "blocks"),
        ("runtime.cuda_graphs=false", "runtime.cuda_graphs", False),
        ("runtime.epilogues=off", "runtime.epilogues", False),
        ("img_data.dataset_fpcs=1", "img_data.dataset_fpcs", (1,)),
    ],
)
def test_override(small, text, path, value):
    got = config.load(small, [text])
    for part in path.split("."):
        got = got[int(part)] if part.isdecimal() else getattr(got, part)
    assert got == value
    if path == "loss.context_warmup":  # integers are steps, decimals fractions
        assert [type(v) for v in got] == [type(v) for v in value]


def test_overrides_apply_in_order(small):
    assert config.load(small, ["seed=1", "seed=2"]).seed == 2


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (
            "optimization.lrr=3",
            ["--set optimization.lrr=3: optimization.lrr: unknown key", "accepted: epochs, ipe", "did you mean lr?"],
        ),
        ("optimizatoin.lr=3", ["optimizatoin: unknown key", "did you mean optimization?"]),
        ("masks.specs.0.num_block=3", ["masks.specs.0.num_block: unknown key", "did you mean num_blocks?"]),
        ("masks.specs.4.num_blocks=1", ["masks.specs.4: no such entry", "0 to 1"]),
        ("optimization.lr=fast", ["optimization.lr: expected a number, got 'fast'"]),
        ("optimization.lr=nan", ["optimization.lr: expected a number"]),
        ("optimization.lr=.inf", ["optimization.lr: expected a number"]),
        ("data.batch_size=2.5", ["data.batch_size: expected an integer, got 2.5"]),
        ("data.batch_size=true", ["data.batch_size: expected an integer, got true"]),
        ("runtime.tensorboard=1", ["runtime.tensorboard: expected true or false, got 1"]),
        (
            "runtime.compile=block",
            ["runtime.compile: unknown value 'block'; accepted: true, false, auto, blocks, target"],
        ),
        ("runtime.cuda_graphs=1", ["runtime.cuda_graphs: unknown value '1'; accepted: true, false, auto"]),
        (
            "runtime.epilogues=inductor",
            ["runtime.epilogues: unknown value 'inductor'; accepted: false, auto, triton, quack, torch"],
        ),
        ("data.fps=x", ["data.fps: expected an integer or null, got 'x'"]),
        ("data.batch_size.x=3", ["data.batch_size: is a single value"]),
        ("data=3", ["data: expected a section of keys, got 3"]),
        ("data_aug.random_resize_scale=[0.3]", ["random_resize_scale: expected a list of 2"]),
        ("objectives.contxt=null", ["objectives.contxt: unknown key; accepted: pred, hw"]),
        ("objectives.hw=0.3", ["objectives.hw: expected a section of keys, got 0.3"]),
        ("lr", ["--set lr: expected section.key=value"]),
        ("folder=", ["folder: expected text, got null"]),
        ("folder=[", ["--set folder=[: not valid YAML"]),
    ],
)
def test_bad_override_is_refused_with_path_and_hint(small, text, expected):
    message = refused(small, text)
    for part in expected:
        assert part in message


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["data.crop_size=65"], "data.crop_size: 65 is not a multiple of data.patch_size 16; use 64"),
        (["data.crop_size=0"], "data.crop_size: must be at least 1"),
        (["data.dataset_fpcs=15"], "data.dataset_fpcs.0: 15 is not a multiple of data.tubelet_size 2; use 16"),
        (["data.dataset_fpcs=[8, 16]"], "2 values for 1 datasets"),
        (["data.datasets_weights=[0.5, 0.5]"], "2 weights for 1 datasets"),
        (["data.datasets_weights=[0.0]"], "not all 0"),
        (
            ["data.fps=4", "data.duration=2.0"],
            "at most one of fps, frame_sample_rate and duration; given: fps, duration",
        ),
        (["masks.specs.0.num_blocks=20000"], "masks.specs.0.num_blocks: must be in [1, 16383], got 20000"),
        (["data.dataset_fpcs=1", "model.img_temporal_dim_size=null"], "set model.img_temporal_dim_size: 1"),
        (["data.batch_size=0"], "data.batch_size: must be at least 1"),
        (["data.max_bad_fraction=1.5"], "data.max_bad_fraction: must be in [0, 1], got 1.5"),
        (["data_aug.random_resize_scale=[0.9, 0.3]"], "0 < low <= high <= 1, got [0.9, 0.3]"),
        (["data_aug.std=[1, 0, 1]"], "data_aug.std: must be greater than 0"),
        (["masks.specs=[]"], "masks.specs: must name at least one mask"),
        (["masks.specs.1.max_temporal_keep=0"], "masks.specs.1.max_temporal_keep: must be in (0, 1]"),
        (["masks.specs.0.spatial_scale=[0.5, 1.5]"], "masks.specs.0.spatial_scale"),
        (["masks.truncate=all"], "masks.truncate: unknown value 'all'; accepted: batch, random, none"),
        (["model.pred_embed_dim=100"], "model.pred_embed_dim: 100 is not a multiple of model.pred_num_heads 8"),
        (["model.embed_dim=100", "model.num_heads=3"], "100 is not a multiple of model.num_heads 3"),
        (["model.levels=0"], "model.levels: must be at least 1"),
        (["model.rope_variant=v3"], "model.rope_variant: unknown value 'v3'; accepted: v2, v2.1"),
        (["target.ema=[0.9, 1.1]"], "target.ema: must be in [0, 1]"),
        (["target.stop_gradient=false"], "target.stop_gradient: false needs target.mode: online"),
        (["optimization.epochs=0"], "optimization.epochs: must be at least 1"),
        (["optimization.lr=-1"], "optimization.lr: must be at least 0"),
        (["optimization.betas=[0.9, 1.0]"], "optimization.betas: must be in [0, 1)"),
        (["runtime.dtype=float8"], "runtime.dtype: unknown value 'float8'; accepted: auto, float32, bfloat16, float16"),
        (["runtime.device=tpu"], "runtime.device: unknown value 'tpu'"),
        (["runtime.compile=true", "masks.truncate=none"], "runtime.compile: true makes a graph for every set of mask"),
        (["runtime.pad_to_multiple=-1"], "runtime.pad_to_multiple: must be at least 0, got -1"),
        (["loss.context_warmup=[0.5, 1.5]"], "loss.context_warmup: must be [start, end]"),
        (["loss.context_warmup=[20, 10]"], "0 <= start <= end"),
        (["img_masks.truncate=batch"], "img_masks: needs img_data"),
        (["img_data.datasets=i.csv"], "img_data.dataset_fpcs: must be 1 (model.img_temporal_dim_size)"),
        (["img_data.dataset_fpcs=1", "img_data.patch_size=14", "img_data.crop_size=28"], "one encoder reads both"),
        (["compat=strict"], "compat: unknown value 'strict'; accepted: intended, published"),
        (["seed=-1"], "seed: must be in [0, 18446744073709551615], got -1"),
        (["objectives={}"], "objectives: no term is named"),
    ],
)
def test_values_that_do_not_go_together_are_refused(small, overrides, expected):
    message = refused(small, *overrides)
    named = f"{small}: " if "img_data.datasets=i.csv" in overrides else "--set "
    assert message.startswith(named) and expected in message


def test_the_flag_that_is_wrong_is_named_and_not_the_file(small):
    from vjepa_fast.config import Given

    lr = Given("optimization.lr=-1", "--lr -1")
    assert refused(small, "seed=1", lr, "optimization.epochs=3").startswith("--lr -1: optimization.lr: must be")
    small.write_text(small.read_text() + "\nseed: -1\n")
    assert refused(small, "optimization.epochs=3").startswith(f"{small}: seed: must be")


@pytest.mark.parametrize("name", config.list_recipes())
def test_every_recipe_says_what_it_is(name):
    from vjepa_fast.config.recipes import about

    said = about(name)
    assert 20 < len(said.what) < 200 and "Data:" not in said.what and not said.what.endswith(".")


def test_a_length_in_steps_keeps_the_share_of_the_warm_up():
    from vjepa_fast.config.length import length

    for steps in (1, 7, 300, 1000, 997):
        before = config.load("mixed_4gpu_baseline").optimization
        after = config.load("mixed_4gpu_baseline", length(steps, before)).optimization
        assert after.epochs * after.ipe == steps and after.epochs <= before.epochs
        share = before.warmup * before.ipe / (before.epochs * before.ipe)
        assert after.warmup * after.ipe == pytest.approx(share * steps, abs=1e-3)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("data: {crop: 64}", "data.crop: unknown key; accepted: datasets, "),
        ("optimization: {lrr: 1}", "optimization.lrr: unknown key"),
        ("data: 3", "data: expected a section of keys, got 3"),
        ("- a", "expected a YAML mapping"),
        ("", "the file is empty"),
        ("data: [", "not valid YAML"),
        ("seed: 1\nseed: 2", "key 'seed' is given twice"),
        ("objectives: {pred: null}", "objectives.pred: expected a section of keys, got null; write {}"),
        ("base: 3", "base: expected a file or recipe name"),
        ("base: nowhere.yaml", "nowhere.yaml: no such file, and no recipe of that name"),
    ],
)
def test_bad_file_is_refused(tmp_path, text, expected):
    path = tmp_path / "bad.yaml"
    path.write_text(text)
    message = refused(path)
    assert expected in message
    assert str(path) in message or "nowhere" in text


def test_missing_file_and_unknown_recipe(tmp_path):
    assert "no such file" in refused(tmp_path / "none.yaml")
    assert "did you mean mixed_4gpu_baseline" in refused("mixed_4gpu_baselin")
    assert "folder without config.yaml" in refused(tmp_path)
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00")
    assert "binary.yaml: cannot be read" in refused(tmp_path / "binary.yaml")


def test_base_inheritance_merges_sections_and_removes_terms(tmp_path, small):
    (tmp_path / "sub").mkdir()
    middle = tmp_path / "sub" / "middle.yaml"
    middle.write_text("base: ../small.yaml\noptimization: {epochs: 5}\nobjectives: {hw: null, ltc: {margin: 0.1}}\n")
    top = tmp_path / "top.yaml"
    top.write_text("base: sub/middle.yaml\nobjectives: {ltc: {coeff: 2.0}}\nmasks: {specs: [{num_blocks: 3}]}\n")
    cfg = config.load(top)
    assert (cfg.optimization.lr, cfg.optimization.epochs, cfg.data.crop_size) == (3e-4, 5, 64)
    assert cfg.objectives == {"pred": {}, "ltc": {"margin": 0.1, "coeff": 2.0}}
    assert [m.num_blocks for m in cfg.masks.specs] == [3]


def test_error_in_a_base_names_the_file_that_holds_it(tmp_path):
    below, above = tmp_path / "below.yaml", tmp_path / "above.yaml"
    below.write_text("optimization: {lr: 1e-4}\n")
    above.write_text("base: below.yaml\noptimization: {lrr: 1}\n")
    assert refused(above).startswith(f"{above}: optimization.lrr")
    below.write_text("optimization: {lrr: 1}\n")
    above.write_text("base: below.yaml\n")
    assert refused(above).startswith(f"{below}: optimization.lrr")
    above.write_text("base: below.yaml\nobjectives: {hw: null}\n")
    below.write_text("seed: 1\n")
    assert "objectives.hw: null removes a term of the base" in refused(above)


def test_a_file_cannot_be_its_own_base(tmp_path):
    (tmp_path / "a.yaml").write_text("base: b.yaml\n")
    (tmp_path / "b.yaml").write_text("base: a.yaml\n")
    assert "is its own base" in refused(tmp_path / "a.yaml")


def test_round_trip(tmp_path, small):
    cfg = config.load(
        small,
        [
            "img_data.dataset_fpcs=1",
            "loss.context_warmup=[3, 5]",
            "objectives.context.warmup=[0.25, 1.0]",
            "data.duration=1.5",
        ],
    )
    assert config.from_dict(config.to_dict(cfg)) == cfg
    again = tmp_path / "run" / "config.yaml"
    again.parent.mkdir()
    again.write_text(config.dump_yaml(cfg))
    assert config.load(again) == cfg
    assert config.load(again.parent) == cfg  # a run folder stands for its config.yaml


def test_later_keys_are_written_only_where_they_differ(small):
    """So that run folders, checkpoints and hashes from before them still match."""
    cfg = config.load(small)
    values = config.to_dict(cfg)
    assert "decoder" not in values["data"] and not {"strategy", "options"} & set(values["masks"])
    texts = ["data.decoder=pyav", "masks.strategy=motion", "masks.options.share=0.5"]
    changed = config.load(small, texts)
    values = config.to_dict(changed)
    assert values["data"]["decoder"] == "pyav" and values["masks"]["options"] == {"share": 0.5}
    assert config.from_dict(values) == changed != cfg
    assert config.load(small, [*texts, "data.decoder=auto", "masks.strategy=blocks", "masks.options={}"]) == cfg
    with pytest.raises(ConfigError, match="masks.options: expected a section of keys, got 3"):
        config.load(small, ["masks.options=3"])


def test_to_dict_is_plain_and_detached(small):
    cfg = config.load(small)
    values = config.to_dict(cfg)

    def plain(value):
        if isinstance(value, dict):
            return all(isinstance(k, str) and plain(v) for k, v in value.items())
        if isinstance(value, list):
            return all(map(plain, value))
        return value is None or type(value) in (bool, int, float, str)

    assert plain(values)
    values["objectives"]["hw"]["coeff"] = 9
    assert cfg.objectives["hw"]["coeff"] == 0.3


def test_mask_tokens_follow_compat(small):
    cfg = config.load(small)
    assert (cfg.model.num_mask_tokens, cfg.model.mask_token_index) == (None, "mask")
    cfg = config.load("mixed_4gpu_baseline", ["compat=published"])
    assert (cfg.model.num_mask_tokens, cfg.model.mask_token_index) == (6, "zero")
    cfg = config.load("mixed_4gpu_baseline", ["compat=published", "model.mask_token_index=mask"])
    assert cfg.model.mask_token_index == "mask"
