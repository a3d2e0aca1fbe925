"""``runtime.dtype: float16``: the loss is scaled, and a step whose gradients overflow changes nothing."""

from __future__ import annotations

import copy

import pytest
import torch

from vjepa_fast import config as configs
from vjepa_fast.errors import ConfigError, TrainingError
from vjepa_fast.trainer import TrainStep, check
from vjepa_fast.trainer.scaling import FRESH, Scaler

from .conftest import batch, config

HALF = torch.float16


def tensors(step):
    state = step.state_dict()
    found = {f"{n}/{k}": v for n in ("encoder", "predictor", "target_encoder", "heads") for k, v in state[n].items()}
    return {key: value.clone() for key, value in found.items()}


def test_the_scale_is_that_of_torch():
    """Against torch.amp.GradScaler, on the same sequence of good and bad steps."""
    theirs, ours = torch.amp.GradScaler("cpu", growth_interval=2000), Scaler()
    p = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([p], lr=0.0)
    assert theirs.state_dict() == FRESH == ours.state_dict()
    for i in range(2100):
        norm = torch.tensor(float("inf") if i in (0, 5, 6, 2050) else 1.0)
        p.grad = norm.reshape(1).clone()
        theirs.scale(torch.ones(()))
        theirs.step(optimizer)
        theirs.update()
        ours.down(norm)
        assert theirs.state_dict() == ours.state_dict(), i
    again = Scaler()
    again.load_state_dict(theirs.state_dict())
    again.load_state_dict(None)
    assert again.state_dict() == ours.state_dict() != FRESH


@pytest.mark.parametrize("limit", [None, 0.1])
def test_gradients_and_norm_are_unscaled(limit):
    """A float32 model with a scaler makes the steps that it makes without: the scale is a power of two."""
    cfg = config(optimization={"clip_grad": limit})
    plain, scaled = TrainStep(cfg), TrainStep(cfg)
    scaled.scaler = Scaler()
    for i in range(3):
        a, b = plain(batch(i), i), scaled(batch(i), i)
        assert torch.equal(a.loss, b.loss) and torch.allclose(a.grad_norm, b.grad_norm, rtol=1e-6)
    wanted, got = tensors(plain), tensors(scaled)
    assert all(torch.allclose(wanted[k], got[k], rtol=1e-5, atol=1e-7) for k in wanted)


def test_float16_follows_float32():
    cfg = config(optimization={"lr": 1e-3, "warmup": 0})
    plain, half = TrainStep(cfg), TrainStep(cfg, dtype=HALF)
    losses = [(plain(batch(i), i).loss.item(), half(batch(i), i).loss.item()) for i in range(4)]
    assert all(a == pytest.approx(b, rel=2e-2) for a, b in losses), losses
    assert half.low is not None and half.low.low[0].dtype == HALF
    assert all(torch.equal(low, full.half()) for low, full in zip(half.low.low, half.low.full))


@pytest.mark.parametrize("compat", ["intended", "published"])
def test_an_overflow_changes_nothing(compat):
    step = TrainStep(config(compat=compat, objectives={"pred": {}}), dtype=HALF)
    step(batch(), 0)
    step.scaler.scale = 2.0**100
    before, moments = tensors(step), copy.deepcopy(step.optimizer.state_dict()["state"])
    out = step(batch(1), 1)
    assert out.loss.isfinite() and out.grad_norm == 0 and step.scaler.scale == 2.0**99
    after = tensors(step)
    changed = {key.split("/")[0] for key in before if not torch.equal(before[key], after[key])}
    assert changed == ({"target_encoder"} if compat == "published" else set())
    now = step.optimizer.state_dict()["state"]
    assert all(torch.equal(moments[i]["exp_avg"], now[i]["exp_avg"]) for i in moments)
    step.scaler.scale = 65536.0
    assert step(batch(1), 1).grad_norm > 0


def test_gradients_that_are_never_finite_end_the_run():
    scaler = Scaler()
    for _ in range(40):
        scaler.down(torch.tensor(float("nan")))
    with pytest.raises(TrainingError, match="float16: gradients are not finite at any scale.*use bfloat16"):
        scaler.down(torch.tensor(float("nan")))


def test_it_is_saved():
    step = TrainStep(config(), dtype=HALF)
    step(batch(), 0)
    step.scaler.scale, step.scaler.good = 8.0, 7
    state, again = copy.deepcopy(step.state_dict()), TrainStep(config(), dtype=HALF)
    again.load_state_dict(state)
    assert again.scaler.state_dict() == state["scaler"] and (again.scaler.scale, again.scaler.good) == (8.0, 7)
    del state["scaler"]  # of a run from before
    again.load_state_dict(state)
    assert TrainStep(config()).state_dict()["scaler"] == FRESH


def test_what_does_not_go_with_it():
    half = {"runtime": {"dtype": "float16", "device": "cpu"}}
    for more, words in (
        ({"optimization": {"name": "muon"}}, "float16 is not supported with optimization.name: muon"),
        ({"method": "levjepa", "model": {"levels": 1}}, "float16 is not supported with method: levjepa"),
    ):
        with pytest.raises(ConfigError, match=words):
            configs.from_dict({**half, **more})
    with pytest.raises(ConfigError, match="cuda_graphs: true, but .*float16 looks at the gradients on the host"):
        check(config(runtime={"dtype": "float16", "cuda_graphs": True}))
