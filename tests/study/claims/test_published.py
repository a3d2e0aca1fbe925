"""The published figures in the package, and the arithmetic on them."""

import json
import math

import pytest

from vjepa_fast import config
from vjepa_fast.errors import DataError
from vjepa_fast.study.claims.published import BASELINES, DATA, SAME_SEED, load_published


@pytest.fixture(scope="module")
def published():
    return load_published()


def test_everything_is_there(published):
    assert len(published.runs) == 31 and len(published.figures) == 88
    assert "arXiv:2605.17165" in published.source
    assert sum(f.top1 for f in published.figures.values()) == pytest.approx(1041.97)
    f = published.figure("mixed_4gpu_fwm_hw_ld", "ssv2")
    assert (f.top1, f.n_train, f.n_val, f.epochs) == (11.6, 168913, 24777, 50)
    assert published.figure("ucf101_4gpu_baseline", "synth").epochs is None  # the probe was not published
    assert published.top1("ucf101_4gpu_baseline", "diving48_full_st_attn") == 5.99


def test_every_run_has_a_recipe_and_the_seed_it_is_said_to_have(published):
    seeds = {run: config.load(run).seed for run in published.runs}
    assert {run for run, seed in seeds.items() if seed == 42} == {BASELINES["mixed"]}
    assert set(seeds.values()) == {42, 239} and seeds[SAME_SEED["mixed"]] == 239


def test_delta_spread_and_sampling_error_by_hand(published):
    delta = published.delta("mixed", "fwm_hw_ld", "ssv2")
    assert (delta.value, delta.arithmetic, delta.epochs) == (3.21, "11.60 - 8.39 = +3.21", [50, 100])
    p, q = 0.116, 0.0839
    assert delta.sampling95 == round(196 * math.sqrt(p * (1 - p) / 24777 + q * (1 - q) / 24777), 2)
    same = published.delta("mixed", "fwm_hw_ld", "ssv2", SAME_SEED["mixed"])
    assert same.arithmetic == "11.60 - 6.62 = +4.98"
    assert published.spread("imagenet100") == (3.6, "24.86 - 21.26 = 3.60")
    assert published.spread("ssv2")[0] == 1.77 and published.spread("diving48") is None


def test_methods(published):
    assert len(published.methods("mixed")) == 15
    assert set(published.methods("mixed")) - set(published.methods("mixed", "*", ("diving48",))) == {"motion_guided"}
    assert published.methods("ucf101", "kinematic*", ("ssv2",)) == ("kinematic_0_1", "kinematic_accel")
    assert published.methods("mixed", "ac, fac") == ("ac", "fac")
    assert published.methods("mixed", "baseline*") == ()


def test_what_was_not_published_is_said(published):
    with pytest.raises(DataError, match="mixed_4gpu_baseline on diving48: no published figure; .*: imagenet100, ssv2$"):
        published.top1("mixed_4gpu_baseline", "diving48")
    with pytest.raises(DataError, match="no published figure; published beside it: nothing"):
        published.top1("mixed_4gpu_none", "kinetics")
    with pytest.raises(DataError, match="'single' is no published pretraining regime; expected one of mixed, ucf101"):
        published.delta("single", "ld", "ssv2")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda f: f.update(top1=math.nan), "mixed_4gpu_ac on diving48: top1 nan"),
        (lambda f: f.update(top1=101), "mixed_4gpu_ac on diving48: top1 101.0 of 1970"),
        (lambda f: f.update(n_val=0), "of 0 samples"),
        (lambda f: f.pop("top1"), "not a file of published results .KeyError: 'top1'"),
        (lambda f: f.update(top1="x"), "not a file of published results"),
    ],
)
def test_damaged_files(tmp_path, change, message):
    content = json.loads((DATA / "published_results.json").read_text())
    change(content["runs"]["mixed_4gpu_ac"]["diving48"])
    (tmp_path / "r.json").write_text(json.dumps(content))
    with pytest.raises(DataError, match=message):
        load_published(tmp_path / "r.json")
    with pytest.raises(DataError, match="none.json: cannot be read"):
        load_published(tmp_path / "none.json")
