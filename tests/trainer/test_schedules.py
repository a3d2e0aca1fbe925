"""Schedules against the values that the published schedulers gave."""

from pathlib import Path

import numpy as np
import pytest

from vjepa_fast.config.schema import Config, OptimizationConfig, TargetConfig
from vjepa_fast.trainer import schedules as s

GOLDEN = np.load(Path(__file__).parent.parent / "goldens" / "schedules.npz")


def close(values, golden):
    np.testing.assert_allclose(np.asarray(list(values)), golden, rtol=1e-12, atol=0)


@pytest.mark.parametrize(
    ("key", "kw"),
    [
        ("lr/cfg_warm10_T100_1e-4_6e-4_1e-6", dict(warmup=10, total=100, start=1e-4, peak=6e-4, final=1e-6)),
        ("lr/paper_warm300_T30000_const", dict(warmup=300, total=30000, start=1e-4, peak=6e-4, final=6e-4)),
    ],
)
def test_lr(key, kw):
    golden = GOLDEN[key]
    close((s.warmup_cosine_lr(i + 1, **kw) for i in range(len(golden))), golden)


@pytest.mark.parametrize(
    ("key", "start", "final"),
    [("wd/up_0.04_0.4_T100", 0.04, 0.4), ("wd/down_0.4_0.04_T100", 0.4, 0.04), ("wd/paper_const", 0.04, 0.04)],
)
def test_weight_decay(key, start, final):
    golden = GOLDEN[key]
    close((s.cosine_weight_decay(i + 1, total=100, start=start, final=final) for i in range(len(golden))), golden)


@pytest.mark.parametrize(
    ("key", "total", "start", "final"),
    [
        ("momentum/0.99_to_1.0_ipe5_ep4_scale1", 20, 0.99, 1.0),
        ("momentum/0.99_to_1.0_ipe5_ep4_scale1.25", 25, 0.99, 1.0),
        ("momentum/paper_0.99925", 30000, 0.99925, 0.99925),
    ],
)
def test_momentum(key, total, start, final):
    golden = GOLDEN[key]
    close((s.ema_momentum(i, total=total, start=start, final=final) for i in range(len(golden))), golden)


def test_from_config_reproduces_the_published_sequence():
    cfg = Config(
        optimization=OptimizationConfig(
            epochs=20,
            ipe=4,
            ipe_scale=1.25,
            warmup=2.5,
            start_lr=1e-4,
            lr=6e-4,
            final_lr=1e-6,
            weight_decay=0.04,
            final_weight_decay=0.4,
        ),
        target=TargetConfig(ema=(0.99, 1.0)),
    )
    plan = s.Schedules.from_config(cfg)
    assert (plan.total_steps, plan.horizon, plan.warmup) == (80, 100, 10)
    close((plan.lr(i) for i in range(80)), GOLDEN["lr/cfg_warm10_T100_1e-4_6e-4_1e-6"][:80])
    close((plan.weight_decay(i) for i in range(80)), GOLDEN["wd/up_0.04_0.4_T100"][:80])
    assert plan.momentum(0) == 0.99 and abs(plan.momentum(50) - 0.995) < 1e-12
    assert [plan.epoch(i) for i in (0, 3, 4, 79)] == [0, 0, 1, 19]


def test_excluded_group_keeps_zero_decay():
    import torch

    from vjepa_fast.trainer import optim

    module = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.LayerNorm(2))
    optimizer = optim.build_optimizer({"encoder": module}, OptimizationConfig(), torch.device("cpu"))
    decay, lr = s.cosine_weight_decay(110, total=100, start=0.04, final=0.4), 1e-3
    optim.set_schedule(optimizer, lr, decay)
    after = [g["weight_decay"] for g in optimizer.param_groups]
    np.testing.assert_allclose(after, GOLDEN["wd/excluded_group_after"], rtol=1e-12)
    assert [[tuple(p.shape) for p in g["params"]] for g in optimizer.param_groups] == [[(2, 3)], [(2,), (2,), (2,)]]
    assert {g["lr"] for g in optimizer.param_groups} == {lr}
