"""`method`: keys of the one are refused under the other, and what LeVJEPA needs."""

import pytest

from vjepa_fast import config
from vjepa_fast.errors import ConfigError

SMALL = "levjepa_small"


@pytest.mark.parametrize(
    ("recipe", "override", "key"),
    [
        (SMALL, "objectives.hw.coeff=0.3", "objectives"),
        (SMALL, "masks.specs.0.num_blocks=4", "masks.specs"),
        (SMALL, "masks.truncate=none", "masks.truncate"),
        (SMALL, "img_masks={specs: [{}]}", "img_masks"),
        (SMALL, "loss.context_warmup=[0,1]", "loss.context_warmup"),
        (SMALL, "target.mode=online", "target.mode"),
        (SMALL, "compat=published", "compat"),
        (SMALL, "model.pred_depth=2", "model.pred_depth"),
        (SMALL, "model.num_mask_tokens=2", "model.num_mask_tokens"),
        (SMALL, "runtime.capacity_quantum=128", "runtime.capacity_quantum"),
        ("synthetic_small", "levjepa.drop=0.5", "levjepa.drop"),
        ("synthetic_small", "levjepa.attention=full", "levjepa.attention"),
    ],
)
def test_a_key_of_the_other_method_is_refused(recipe, override, key):
    method = "levjepa" if recipe == SMALL else "vjepa"
    with pytest.raises(ConfigError, match=f"{key}: has no effect under method: {method}; take it out"):
        config.load(recipe, [override])


@pytest.mark.parametrize(
    ("override", "refused"),
    [
        ("method=mae", "method: unknown value 'mae'; accepted: vjepa, levjepa"),
        ("levjepa.local_crop=20", "levjepa.local_crop: 20 is not a multiple of data.patch_size 12; use 24"),
        ("levjepa.drop=1.0", r"levjepa.drop: must be in \[0, 1\)"),
        ("levjepa.attention=causal", "levjepa.attention: unknown value 'causal'; accepted: full, block_causal"),
        ("model.levels=4", "model.levels: must be 1 under method: levjepa"),
        ("data.batch_size=1", "data.batch_size: must be at least 2 under method: levjepa"),
        ("levjepa.average_every=401", "levjepa.average_every: must be at most the steps of the run, 400, got 401"),
    ],
)
def test_what_levjepa_needs(override, refused):
    with pytest.raises(ConfigError, match=refused):
        config.load(SMALL, [override])


def test_clips_of_several_lengths_are_refused():
    overrides = ["data.datasets=[a.csv,b.csv]", "data.dataset_fpcs=[8,4]"]
    with pytest.raises(ConfigError, match="data.dataset_fpcs: must be one number under method: levjepa"):
        config.load(SMALL, overrides)


def test_a_configuration_from_before_is_the_same_text():
    """Run folders, checkpoints and study cells of V-JEPA hold no key of the new method."""
    assert not {"method", "levjepa"} & set(config.to_dict(config.load("synthetic_small")))
    own = config.load(SMALL)
    assert config.from_dict(config.to_dict(own)) == own and config.to_dict(own)["method"] == "levjepa"


def test_the_published_recipe_has_the_published_values():
    cfg = config.load("levjepa_vitb")
    data, own, opt = cfg.data, cfg.levjepa, cfg.optimization
    assert (data.crop_size, data.patch_size, data.tubelet_size, data.dataset_fpcs) == (224, 16, 1, (16,))
    assert (own.local_views, own.local_crop, own.local_scale) == (10, 96, (0.02, 0.4))
    assert (own.jitter, own.hue, own.grey, cfg.data_aug.random_resize_scale) == (0.8, 0.1, 0.2, (0.8, 1.0))
    assert (own.drop, own.attention, own.proj_hidden, own.proj_dim) == (0.95, "block_causal", 2048, 256)
    assert (own.sigreg, own.num_slices, own.knots) == (0.02, 1024, 17)
    assert (own.average, own.average_every) == (0.9999, 32)
    assert data.batch_size * opt.accumulate * 16 == 3072  # on 16 GPUs
    assert (opt.epochs * opt.ipe, opt.warmup * opt.ipe) == (10_000, 1200)
    assert (opt.start_lr, opt.lr, opt.final_lr, opt.betas) == (1e-4, 4e-4, 4e-4, (0.9, 0.95))
    assert (opt.weight_decay, opt.final_weight_decay, cfg.runtime.dtype) == (0.04, 0.04, "bfloat16")
