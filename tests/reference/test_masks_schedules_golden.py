"""The reference's mask collator, draw for draw, and its schedules against the published code."""

from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch

from vjepa_fast.reference import MaskCollator, MaskGenerator, motion_map, schedules

GOLDENS = Path(__file__).parents[1] / "goldens"
GRID = (8, 14, 14)
CONFIGS = {"m8": {}, "m2": {"num_blocks": 2, "spatial_scale": (0.7, 0.7)}}


@cache
def load(name):
    with np.load(GOLDENS / f"{name}.npz") as file:
        return {key: file[key] for key in file.files}


@pytest.mark.parametrize("name", CONFIGS)
def test_fixed_seed_masks(name):
    z = load("masks")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1234)
        generator = MaskGenerator(grid=GRID, **CONFIGS[name])
        lengths = []
        for call in range(10):
            enc, pred = generator(8)
            lengths.append((enc.shape[1], pred.shape[1]))
            if call < 3:
                np.testing.assert_array_equal(enc, z[f"mask/{name}/seed1234_call{call}/enc"])
                np.testing.assert_array_equal(pred, z[f"mask/{name}/seed1234_call{call}/pred"])
    np.testing.assert_array_equal(lengths, z[f"mask/{name}/lens_seed1234_step0_9"])
    sizes = [generator.sample_block_size(counter) for counter in range(10)]
    np.testing.assert_array_equal(sizes, z[f"mask/{name}/block_sizes_step0_9"])


@pytest.mark.parametrize("name", CONFIGS)
def test_motion_guided_masks(name):
    z = load("masks")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(77)
        generator = MaskGenerator(grid=GRID, motion_guided=True, **CONFIGS[name])
        enc, pred = generator(2, torch.from_numpy(z["motion/large_blob/map"]))
    np.testing.assert_array_equal(enc, z[f"mask/{name}/motion_seed77/enc"])
    np.testing.assert_array_equal(pred, z[f"mask/{name}/motion_seed77/pred"])


def test_future_masks():
    z = load("masks")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        enc, pred = MaskGenerator(grid=GRID, num_blocks=4, max_temporal_keep=0.5, full_complement=True)(4)
    np.testing.assert_array_equal(enc, z["mask/future_m4/seed5/enc"])
    np.testing.assert_array_equal(pred, z["mask/future_m4/seed5/pred"])


def test_motion_map():
    z = load("masks")
    clip = torch.from_numpy(z["motion/small/video_u8"]).float()
    want = z["motion/small/map"]
    np.testing.assert_allclose(motion_map(clip, (8, 7, 7), per_sample=True), want, rtol=1e-6, atol=1e-7)
    np.testing.assert_allclose(motion_map(clip[:1], (8, 7, 7)), want[:1], rtol=1e-6, atol=1e-7)
    with pytest.raises(RuntimeError, match="must match"):
        motion_map(clip, (8, 7, 7))  # as published: B=2 does not broadcast over T=8
    assert motion_map(clip[:, :, :1], (1, 7, 7)) is None


def test_collator_draws_every_mask():
    collator = MaskCollator([CONFIGS["m8"], CONFIGS["m2"] | {"motion_guided": True}], (4, 4, 4), per_sample_motion=True)
    with torch.random.fork_rng(devices=[]):
        enc, pred = collator(torch.rand(2, 3, 8, 64, 64))
    assert len(enc) == len(pred) == 2
    assert all(e.shape[0] == p.shape[0] == 2 and e.shape[1] + p.shape[1] <= 64 for e, p in zip(enc, pred))


class Optimizer:
    def __init__(self):
        self.param_groups = [{"weight_decay": 0.04}, {"weight_decay": 0.0, "WD_exclude": True}]


LEARNING_RATES = {
    "cfg_warm10_T100_1e-4_6e-4_1e-6": dict(warmup=10, start=1e-4, ref=6e-4, final=1e-6, total=100),
    "paper_warm300_T30000_const": dict(warmup=300, start=1e-4, ref=6e-4, final=6e-4, total=30000),
}


@pytest.mark.parametrize("name", LEARNING_RATES)
def test_learning_rate(name):
    want = load("schedules")[f"lr/{name}"]
    optimizer = Optimizer()
    schedule = schedules.WarmupCosineLR(optimizer, **LEARNING_RATES[name])
    np.testing.assert_allclose([schedule.step() for _ in want], want, rtol=1e-12)
    assert all(group["lr"] == pytest.approx(want[-1]) for group in optimizer.param_groups)


def test_annealing_learning_rate():
    want = load("schedules")["lr/linear_decay_T50_6e-4_1e-6"]
    schedule = schedules.LinearDecayLR(Optimizer(), ref=6e-4, final=1e-6, total=50)
    np.testing.assert_allclose([schedule.step() for _ in want], want, rtol=1e-12)


@pytest.mark.parametrize(
    ("name", "ref", "final", "total"),
    [("up_0.04_0.4_T100", 0.04, 0.4, 100), ("down_0.4_0.04_T100", 0.4, 0.04, 100), ("paper_const", 0.04, 0.04, 30000)],
)
def test_weight_decay(name, ref, final, total):
    z = load("schedules")
    want = z[f"wd/{name}"]
    optimizer = Optimizer()
    schedule = schedules.CosineWD(optimizer, ref=ref, final=final, total=total)
    np.testing.assert_allclose([schedule.step() for _ in want], want, rtol=1e-12)
    decays = [group["weight_decay"] for group in optimizer.param_groups]
    np.testing.assert_allclose(decays, [want[-1], 0.0], rtol=1e-12)
    if name.startswith("up"):
        np.testing.assert_allclose(decays, z["wd/excluded_group_after"], rtol=1e-12)


@pytest.mark.parametrize(
    ("name", "ema", "scale"),
    [
        ("0.99_to_1.0_ipe5_ep4_scale1", (0.99, 1.0), 1.0),
        ("0.99_to_1.0_ipe5_ep4_scale1.25", (0.99, 1.0), 1.25),
        ("paper_0.99925", (0.99925, 0.99925), 1.0),
    ],
)
def test_momentum(name, ema, scale):
    got = list(schedules.momentum(ema, 5, 4, scale))
    np.testing.assert_allclose(got, load("schedules")[f"momentum/{name}"], rtol=1e-12)


def test_context_weight_and_anneal():
    z = load("schedules")
    got = [schedules.context_weight(0.5, int(step)) for step in z["lambda/steps"]]
    np.testing.assert_allclose(got, z["lambda/0.5"], rtol=1e-12)
    got = [schedules.kinematic_anneal(0.1, epoch, 100) for epoch in (0, 24, 50, 99)]
    np.testing.assert_allclose(got, z["kinematic_anneal/coeff_0.1_epochs_0_24_50_99_of_100"], rtol=1e-12)
