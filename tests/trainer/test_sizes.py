"""Size and length of a run by steps that are timed; here by what is said to be timed."""

import copy
import functools
import importlib

import pytest

from vjepa_fast import config, trainer
from vjepa_fast.errors import UserError
from vjepa_fast.trainer import sizes
from vjepa_fast.trainer.sizes import Size, choose, read_sizes

FIXED = ["data.datasets=[x.csv]", "runtime.device=cpu"]


@pytest.fixture(autouse=True)
def recipes_are_read_once(monkeypatch):
    loading = importlib.import_module("vjepa_fast.config.load")
    read = functools.cache(loading._read_yaml)
    monkeypatch.setattr(loading, "_read_yaml", lambda path: copy.deepcopy(read(path)))


def machine(flops, most=1e99):
    """A machine that makes so much arithmetic a second, and has room for steps of at most so much."""
    asked = []

    def timed(cfg):
        asked.append(cfg)
        cost = sizes.work(cfg)
        return None if cost > most else cost / flops

    timed.asked = asked
    return timed


def chosen(flops, minutes=60, **more):
    timed = machine(flops, more.pop("most", 1e99))
    return choose("own_videos", FIXED, minutes=minutes, timed=timed, **more), timed.asked


def test_every_size_can_be_trained():
    widths = []
    for size in read_sizes():
        cfg = config.load("own_videos", [*FIXED, *sizes._texts(size.set), f"data.batch_size={size.batch}"])
        encoder = trainer.check(cfg).encoder
        widths.append(encoder.embed_dim)
    assert widths == [96, 128, 192, 384, 768, 1024]
    costs = [sizes.work(sizes._configured("own_videos", size, FIXED, ())) for size in read_sizes()]
    assert costs == sorted(costs) and len(set(costs)) == len(costs)


def test_a_faster_machine_gets_a_larger_model_and_measures_few():
    names = [size.name for size in read_sizes()]
    found = []
    for flops in (1e7, 1e10, 1e11, 1e16):
        choice, asked = chosen(flops)
        found.append(names.index(choice.size.name))
        assert len(asked) <= 3
        assert choice.steps * choice.seconds <= 3600 or choice.steps == 10
        if choice.size.name != names[0]:
            assert choice.steps >= choice.size.steps
    assert found == sorted(found) and found[0] == 0 and found[-1] == len(names) - 1 and len(set(found)) >= 3


def test_more_minutes_and_given_steps():
    small, large = chosen(1e10, minutes=1)[0], chosen(1e10, minutes=600)[0]
    assert sizes.work(small.cfg) < sizes.work(large.cfg)
    few = chosen(1e10, minutes=60, steps=20)[0]
    assert few.steps == 20 and sizes.work(few.cfg) >= sizes.work(chosen(1e10, minutes=60)[0].cfg)


def test_a_size_that_does_not_fit_the_memory_is_not_taken():
    most = sizes.work(sizes._configured("own_videos", read_sizes()[2], FIXED, ()))
    choice, _ = chosen(1e14, most=most)
    assert choice.size == read_sizes()[2] and None in choice.tried.values()
    with pytest.raises(UserError, match="not even the smallest"):
        chosen(1e14, most=0)


def test_what_the_user_sets_is_kept():
    own = ["data.batch_size=3", "optimization.lr=1e-5", "optimization.epochs=3", "data.fps=4"]
    choice, _ = chosen(1e11, own=own)
    cfg = choice.cfg
    assert (cfg.data.batch_size, cfg.optimization.accumulate) == (3, 1)
    assert (cfg.optimization.lr, cfg.optimization.epochs, cfg.data.fps) == (1e-5, 3, 4)
    assert choice.steps == 3 * cfg.optimization.ipe


def test_the_schedules_are_those_of_the_length():
    choice, _ = chosen(1e11)
    o, (first, last) = choice.cfg.optimization, choice.cfg.target.ema
    assert o.epochs * o.ipe == choice.steps and o.start_lr < o.lr > o.final_lr
    assert 0.95 <= first < last < 1
    assert choice.cfg.runtime.save_every <= choice.steps and choice.cfg.runtime.log_every <= choice.steps


def test_it_is_said_in_one_line():
    choice, _ = chosen(1e11)
    text = str(choice)
    assert text.startswith(f"{choice.size.name}, ") and f"{choice.steps:,} steps of" in text
    assert "about" in text and text.endswith("on this CPU") and "\n" not in text


def test_steps_are_really_timed(tiny_suites):
    size = Size("tiny", 1, 4, {"data.crop_size": 32, "data.patch_size": 16, "data.dataset_fpcs": [4]})
    fixed = [f"data.datasets=['{tiny_suites['motion8']['train']}']", "data.num_workers=0", "runtime.device=cpu"]
    short = ["runtime.dtype=float32", "data.frame_sample_rate=1", "data.fps=null"]
    choice = choose("own_videos", [*fixed, *short], minutes=0.01, sizes=[size])
    assert 0 < choice.seconds < 30 and choice.steps >= 10
