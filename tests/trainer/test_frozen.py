"""``target.mode: frozen``: the encoder of another run is the target, stays as it is, and is not what is evaluated."""

import json
import shutil

import pytest
import torch

from vjepa_fast.data.synthetic import render_suite
from vjepa_fast.errors import CheckpointError, ConfigError
from vjepa_fast.models import from_fair, load_encoder
from vjepa_fast.trainer import TrainStep, starting, train
from vjepa_fast.trainer.checkpoint import latest

from .conftest import batch, config


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """(configuration of a frozen run, its folder, that of the run whose encoder is its target)."""
    folder = tmp_path_factory.mktemp("frozen")
    path = render_suite("motion8", folder / "clips", splits={"train": 12}, size=32, frames=8, seed=0)["train"]
    data = {"datasets": (path,)}
    train(config(folder / "teacher", data=data), max_steps=3)
    cfg = config(folder / "student", data=data, seed=5, target={"mode": "frozen", "path": str(folder / "teacher")})
    train(cfg, max_steps=4)
    return cfg, folder / "student", folder / "teacher"


def test_the_target_stays_and_the_encoder_is_what_is_loaded(runs):
    _, student, teacher = runs
    target = load_encoder(teacher).state_dict()
    assert same(load_encoder(student, "target_encoder").state_dict(), target)
    trained = load_encoder(student)
    assert same(trained.state_dict(), load_encoder(student, "encoder").state_dict())
    assert not torch.equal(trained.state_dict()["blocks.0.attn.qkv.weight"], target["blocks.0.attn.qkv.weight"])
    rows = [json.loads(line) for line in (student / "metrics.jsonl").read_text().splitlines()]
    assert len(rows) == 4 and {row["ema"] for row in rows} == {1.0}


def test_the_loss_is_against_that_target(runs):
    cfg, _, teacher = runs
    step = TrainStep(cfg)
    lines = starting.take(cfg, step, None)
    assert lines == starting.describe(cfg) and len(lines) == 1
    assert lines[0].startswith("target, frozen: target_encoder of ") and "step 3 of a run" in lines[0]
    plain = TrainStep(config(seed=5))
    plain.target_encoder.load_state_dict(load_encoder(teacher).state_dict())
    assert step(batch(), 0).loss == plain(batch(), 0).loss  # the same step but for what the target does after it
    assert same(step.encoder.state_dict(), plain.encoder.state_dict())
    assert not same(plain.target_encoder.state_dict(), step.target_encoder.state_dict())
    low = TrainStep(cfg, dtype=torch.bfloat16)
    starting.take(cfg, low, None)
    for small, full in zip(low.low.low, low.low.full):
        assert torch.equal(small, full.bfloat16())


def test_a_run_goes_on_without_the_file_of_its_target(runs, tmp_path):
    cfg, student, _ = runs
    there = shutil.copytree(student, tmp_path / "student")
    whole = train(config(tmp_path / "whole", **sections(cfg)), max_steps=6)
    gone = {**sections(cfg), "target": {"mode": "frozen", "path": str(tmp_path / "nothing.pt")}}
    again = train(config(there, **gone), max_steps=6)
    assert again.last_metrics["loss"] == whole.last_metrics["loss"]
    for which in ("encoder", "target_encoder"):
        assert same(load_encoder(there, which).state_dict(), load_encoder(tmp_path / "whole", which).state_dict())


def sections(cfg):
    return {
        "data": {"datasets": cfg.data.datasets},
        "seed": cfg.seed,
        "target": {"mode": "frozen", "path": cfg.target.path},
    }


def test_a_student_can_be_the_next_target_and_init_gives_the_rest(runs):
    cfg, student, teacher = runs
    cfg = config(seed=9, target={"mode": "frozen", "path": str(student)}, init={"path": str(teacher)})
    step = TrainStep(cfg)
    lines = starting.take(cfg, step, None)
    assert same(step.target_encoder.state_dict(), load_encoder(student, "encoder").state_dict())
    content = torch.load(latest(teacher), weights_only=True)
    assert same(step.encoder.state_dict(), from_fair(content["encoder"]))
    assert [line.split(":")[0] for line in lines].count("target, frozen") == 1
    assert not any("target_encoder: taken" in line for line in lines)


def test_what_cannot_be_is_refused(runs):
    _, _, teacher = runs
    from vjepa_fast.config.checks import check

    with pytest.raises(ConfigError, match=r"target.path: target.mode: frozen needs it"):
        check(config(target={"mode": "frozen"}))
    with pytest.raises(ConfigError, match=r"target.path: has no effect under target.mode: ema"):
        check(config(target={"path": "x"}))
    other = config(target={"mode": "frozen", "path": str(teacher)}, model={"depth": 5})
    with pytest.raises(CheckpointError, match="step-00000003.pt"):
        starting.take(other, TrainStep(other), None)
    assert starting.describe(other)[0].startswith("train would refuse target.path: ")
