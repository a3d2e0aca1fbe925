import dataclasses

import pytest

from vjepa_fast import config, objectives
from vjepa_fast.errors import ConfigError, UserError
from vjepa_fast.study.records import COMPATS
from vjepa_fast.study.run import variants
from vjepa_fast.study.run.suites import REGIMES, Settings, suite_of
from vjepa_fast.study.run.training import settings_text
from vjepa_fast.study.run.variants import COUNTED, OTHER_METHODS, PIXELS, RIVAL, VARIANTS, apply, changes

OF_VJEPA = [name for name in VARIANTS if name not in OTHER_METHODS]

EIGHTEEN = [
    "motion_guided",
    "amg",
    "hw",
    "delta",
    "fwm",
    "ld",
    "fwm_ld",
    "hw_ld",
    "fwm_hw_ld",
    "combo",
    "spectral",
    "ltc",
    "ac",
    "ac_hw",
    "fac",
    "kinematic",
    "velgate",
    "hamiltonian",
]


def baseline_of(variant):
    return config.load(VARIANTS[variant].split("_4gpu_")[0] + "_4gpu_baseline")


def test_eighteen_are_counted_and_all_means_them_with_baseline_and_controls():
    assert list(COUNTED) == EIGHTEEN
    assert variants.names("all") == ["baseline", *EIGHTEEN, "fwm_hw", "pixels"]
    assert variants.names("hw, baseline,hw") == ["baseline", "hw"]
    with pytest.raises(UserError, match="nonsense: no variant of that name; known: all, baseline"):
        variants.names("baseline,nonsense")
    with pytest.raises(UserError, match="no variant is named"):
        variants.names(",")


@pytest.mark.parametrize("name", [n for n in OF_VJEPA if n != "fwm_hw"])
def test_a_variant_on_the_published_baseline_is_its_recipe(name):
    recipe = config.load(VARIANTS[name])
    made = apply(name, baseline_of(name))
    assert dataclasses.replace(made, folder=recipe.folder) == recipe


def test_values_of_the_study():
    """Figures of the study's text, so that a changed recipe does not change it unseen."""
    assert changes("hw").objectives == {"hw": {"coeff": 0.3, "temp": 1.0, "loss_exp": 1.0}}
    assert changes("fwm_hw_ld").objectives["hw"]["coeff"] == 1.0
    assert changes("ld").objectives == {"ld": {"coeff": 1.0, "hidden_dim": 256}}
    assert set(changes("combo").objectives) == {"hw", "delta"}
    for name, strength, rate in (("motion_guided", 2.0, 0.1), ("amg", 5.0, 0.0), ("combo", 5.0, 0.0)):
        for spec in changes(name).masks:
            made = {"motion_guided_strength": 2.0, "motion_guided_random_rate": 0.1, **spec}
            assert (made["motion_guided_strength"], made["motion_guided_random_rate"]) == (strength, rate)
            assert spec["motion_guided"] is True
    assert changes("kinematic").target == {"mode": "online"} and changes("velgate").target == {}
    assert changes("baseline") == variants.Changes()


def test_the_control_is_the_headline_without_latent_dynamics():
    headline, control = changes("fwm_hw_ld"), changes("fwm_hw")
    assert {k: v for k, v in headline.objectives.items() if k != "ld"} == control.objectives
    assert set(headline.objectives) - set(control.objectives) == {"ld"} and "fwm_hw" not in COUNTED


@pytest.mark.parametrize("regime", REGIMES)
@pytest.mark.parametrize("compat", COMPATS)
def test_every_variant_builds_on_the_synthetic_suite(regime, compat, tmp_path):
    suite = suite_of(Settings(), tmp_path)
    for name in OF_VJEPA:
        cfg = apply(name, suite.baseline(regime, compat, seed=3))
        config.from_dict(config.to_dict(cfg))
        plan = objectives.build_objectives(
            cfg.objectives,
            levels=cfg.model.levels,
            embed_dim=cfg.model.embed_dim,
            compat=compat,
            target_grad=cfg.target.mode == "online",
            seed=cfg.seed,
        )
        assert set(plan.terms) == {"pred", "context", *changes(name).objectives}
        assert cfg.seed == 3 and cfg.compat == compat
        assert cfg.data.batch_size * cfg.optimization.accumulate == 64  # as many clips per step for every variant


def test_the_synthetic_headline_is_the_demos_but_for_the_published_context_term(tmp_path):
    suite = suite_of(Settings(), tmp_path)
    for regime in REGIMES:
        made, demo = (
            apply("fwm_hw_ld", suite.baseline(regime, "intended", 239)),
            config.load(f"demo_fwm_hw_ld_{regime}"),
        )
        assert made.objectives.pop("context") == {
            "coeff": 0.5,
            "loss_exp": 1.0,
            "warmup": [0.5, 1.0],
            "weight_distance": True,
            "offset": False,
        }
        demo.objectives.pop("context")
        assert made.objectives == demo.objectives  # heads no wider than the encoder
        recipe = config.load("laptop_study")
        assert (made.model, made.masks, made.optimization) == (recipe.model, recipe.masks, recipe.optimization)


def test_published_context_loss_keeps_its_steps(tmp_path):
    suite = suite_of(Settings(), tmp_path)
    cfg = suite.baseline("single", "published", 0)
    assert cfg.objectives["context"]["warmup"] == [15000, 30000]
    assert cfg.optimization.epochs * cfg.optimization.ipe < 15000


def test_published_motion_maps_take_micro_batches_or_are_refused(tmp_path):
    suite = suite_of(Settings(), tmp_path)
    for name in ("motion_guided", "amg", "combo"):
        cfg = apply(name, suite.baseline("single", "published", 0))
        assert (cfg.data.batch_size, cfg.optimization.accumulate) == (4, 16)
        assert apply(name, suite.baseline("single", "intended", 0)).data.batch_size == 64
    suite = suite_of(Settings(overrides=("data.batch_size=6",)), tmp_path)
    with pytest.raises(ConfigError, match="motion_guided: .*batches of 1 or 4 clips.*data.batch_size=8"):
        apply("motion_guided", suite.baseline("single", "published", 0))


def test_a_baseline_with_other_masks_is_refused():
    cfg = config.load("synthetic_small")  # one mask
    with pytest.raises(ConfigError, match="changes 2 masks, the suite's baseline has 1"):
        apply("amg", cfg)


@pytest.mark.parametrize("regime", REGIMES)
def test_masked_pixels_replace_the_latent_target_and_nothing_else(regime, tmp_path):
    base = suite_of(Settings(), tmp_path).baseline(regime, "intended", 3)
    made = apply(PIXELS, base)
    assert made.objectives == {"pixels": {"eps": 0.01}} and made.target.mode == "online"
    same = {"objectives": base.objectives, "target": dataclasses.replace(made.target, mode=base.target.mode)}
    assert dataclasses.replace(made, **same) == base and base.target.mode == "ema"
    assert config.from_dict(config.to_dict(made)) == made


@pytest.mark.parametrize("regime", REGIMES)
def test_levjepa_takes_data_encoder_and_steps_of_the_suite_and_its_own_method(regime, tmp_path):
    for scale in (1.0, 0.01):
        base = suite_of(Settings(scale=scale), tmp_path).baseline(regime, "intended", 3)
        made, recipe = apply(RIVAL, base), config.load("levjepa_small")
        assert config.from_dict(config.to_dict(made)) == made and made.method == "levjepa"
        assert dataclasses.replace(made.data, tubelet_size=base.data.tubelet_size) == base.data
        assert (made.seed, made.folder, made.runtime) == (base.seed, base.folder, base.runtime)
        for key in ("model_name", "embed_dim", "depth", "num_heads"):
            assert getattr(made.model, key) == getattr(base.model, key)
        steps = base.optimization.epochs * base.optimization.ipe
        assert made.optimization.epochs * made.optimization.ipe == steps
        assert (made.optimization.lr, made.optimization.betas) == (recipe.optimization.lr, recipe.optimization.betas)
        assert dataclasses.replace(made.levjepa, average_every=recipe.levjepa.average_every) == recipe.levjepa
    text = settings_text(made, {"a": 1.0})
    assert set(text) - {"views"} == set(settings_text(base, {"a": 1.0}))
    assert text["views"] == "1 of 48 px, 4 of 24 px and 0.2 to 0.6 of the area" and "sigreg" in text["objectives"]


def test_levjepa_at_other_sizes_and_as_published():
    base = config.load("mixed_4gpu_baseline")
    base = dataclasses.replace(base, optimization=dataclasses.replace(base.optimization, epochs=50))
    made = apply(RIVAL, dataclasses.replace(base, compat="intended"))
    assert (made.data.tubelet_size, made.levjepa.local_crop, made.levjepa.drop) == (1, 96, 0.95)  # levjepa_vitb
    assert made.optimization.warmup == 6  # of 50 epochs
    data = dataclasses.replace(base.data, crop_size=112)
    made = apply(RIVAL, dataclasses.replace(base, compat="intended", data=data))
    assert (made.levjepa.local_crop, made.levjepa.drop) == (64, 0.5)  # half of the crop, in whole patches
    for name in OTHER_METHODS:
        with pytest.raises(
            ConfigError, match=f"{name}: no run of the study was published; leave it out of --published"
        ):
            apply(name, dataclasses.replace(base, compat="published"))
    assert RIVAL not in variants.names("all") and variants.names("levjepa,baseline") == ["baseline", RIVAL]
