"""A step that failed is kept whole, made again, and the module is named where values stop being finite."""

import dataclasses
import json
import math

import pytest
import torch
from torch import nn

from vjepa_fast.cli import main
from vjepa_fast.data.synthetic import render_suite
from vjepa_fast.errors import CheckpointError, TrainingError
from vjepa_fast.models import digests
from vjepa_fast.trainer import bundle, checkpoint, replay, run_folder, train
from vjepa_fast.trainer import trainer as loop
from vjepa_fast.trainer.step import TrainStep

from .conftest import config


def settings(folder, manifest, **sections):
    sections["data"] = {"datasets": (str(manifest),), **sections.get("data", {})}
    return config(folder, **sections)


def failing(cfg, change, at: int):
    """A run in which ``change`` is made to its step before step ``at``, which ends it; the path of its bundle."""
    one = loop.Trainer._one

    def changed(self, feed, end, *, stop):
        if self.done + 1 == at:
            with torch.no_grad():
                change(self.step)
        return one(self, feed, end, stop=stop)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop.Trainer, "_one", changed)
        with pytest.raises(TrainingError, match=f"step {at}: not finite"):
            train(cfg)
    return bundle.path_of(cfg.folder, at)


def planted(step: TrainStep):
    step.encoder.blocks[2].norm2.weight[5] = math.nan


@pytest.fixture(scope="module")
def nan_weight(manifest, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "run"
    return failing(settings(folder, manifest, runtime={"log_every": 3, "save_every": 2}), planted, 5)


def test_a_planted_weight_is_named_with_what_went_in_and_out(nan_weight, capsys):
    assert main(["replay", str(nan_weight)]) == 0
    out = capsys.readouterr().out
    assert out.startswith("step 5 of a run in float32: loss=nan")
    assert out.count("fails again") == 1 and "loss=nan" in out
    assert "  weights: encoder.blocks.2.norm2.weight is not finite before the step" in out
    named = out.split("forward: first not finite at ")[1].split("\n")
    assert named[0].startswith("encoder.blocks.2") and "input" in named[1] and "all finite" in named[1]
    content, _ = replay.read(nan_weight)
    assert content["weights_step"] == 4 and len(content["batches"]) == 1


def sound(path):
    """The bundle without what was planted."""
    content, cfg = replay.read(path)
    for part in ("encoder", "target_encoder"):
        content[part] = {k: torch.nan_to_num(v, nan=1.0) for k, v in content[part].items()}
    return content, cfg


@pytest.mark.parametrize("place", ["encoder.blocks.2.norm2", "predictor.predictor_blocks.1.attn.proj"])
def test_a_weight_that_is_not_finite_is_found_in_any_precision(nan_weight, place):
    content, cfg = sound(nan_weight)
    root, _, name = place.partition(".")
    step = TrainStep(cfg)
    module = {"encoder": step.encoder, "predictor": step.predictor}[root].get_submodule(name)
    key = next(k for k in content[root] if k.endswith(f"{name}.weight"))
    assert content[root][key].shape == module.weight.shape
    content[root][key] = content[root][key].clone()
    content[root][key].view(-1)[3] = math.inf
    for dtype in ("float32", "float64", "bfloat16"):
        found = replay.replay(content, cfg, dtype)
        assert found.fails and found.weights == f"{place}.weight" and found.forward is not None
        inner = place.rsplit(".", 1)[0] if place.endswith("proj") else place.removesuffix(".norm2")
        assert found.forward.module.startswith(inner) or place.startswith(found.forward.module)
        assert all(s.bad == 0 for s in found.forward.inputs) and any(s.bad for s in found.forward.outputs)


def grown(step: TrainStep):
    """Finite weights whose products do not fit 16 bits."""
    block = step.encoder.blocks[1]
    for p in (block.mlp.fc1.weight, block.mlp.fc2.weight):
        p.mul_(3e3)


def test_an_overflow_of_float16_is_named_and_float32_has_none(manifest, tmp_path, capsys):
    cfg = settings(tmp_path / "run", manifest, runtime={"dtype": "float16", "save_every": 2})
    path = failing(cfg, grown, 4)
    assert main(["replay", str(path), "--dtype", "float32", "--dtype", "float64"]) == 0
    out = capsys.readouterr().out
    half, single, double = (out.split(f"{name}: step 4")[1] for name in ("float16", "float32", "float64"))
    assert "fails again" in half and "forward: first not finite at encoder.blocks.1" in half.split("float32:")[0]
    assert single.startswith(" does not fail") and double.startswith(" does not fail")
    assert "all finite, up to" in half and "values not finite, the others up to" in half
    losses = [float(part.split("loss=")[1].split(",")[0]) for part in (single, double)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-2) and math.isfinite(losses[0])


class Steep(torch.autograd.Function):
    """The identity, whose gradient is not finite."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, g):
        return g * math.inf


class Planted(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, *args, **kwargs):
        return Steep.apply(self.inner(*args, **kwargs))


def test_a_gradient_is_named_by_the_module_that_makes_it(nan_weight, monkeypatch):
    content, cfg = sound(nan_weight)
    take = replay.take_weights

    def with_plant(step, content):
        modules = take(step, content)
        step.encoder.blocks[1] = Planted(step.encoder.blocks[1])
        return modules

    monkeypatch.setattr(replay, "take_weights", with_plant)
    found = replay.replay(content, cfg, "float32")
    assert found.fails and found.forward is None and math.isfinite(found.values["loss"])
    assert found.backward is not None and found.backward.module == "encoder.blocks.1"
    assert all(s.bad == 0 for s in found.backward.inputs) and found.backward.outputs[0].bad > 0
    assert "backward: first not finite at encoder.blocks.1" in "\n".join(replay.report(content, found))


class Chain(nn.Module):
    """A module whose gradient overflows between two that are fine, or a parameter whose gradient does."""

    def __init__(self, steep):
        super().__init__()
        self.first, self.second, self.third = nn.Linear(3, 3), nn.Linear(3, 3), nn.Linear(3, 3)
        self.steep = steep

    def forward(self, x):
        x = self.first(x)
        return self.third(self.second(Steep.apply(x)) if self.steep else self.second(x))


def test_of_modules_side_by_side_the_one_that_makes_it_is_named():
    chain, x = Chain(steep=False), torch.ones(2, 3)
    chain.second.register_full_backward_hook(lambda m, gi, go: (gi[0] * math.inf,))
    with replay.Watch({"chain": chain}) as watch:
        chain(x).sum().backward()
    assert watch.backward is not None and watch.backward.module == "chain.second" and watch.forward is None
    chain = Chain(steep=True)
    with replay.Watch({"chain": chain}) as watch:
        chain(x).sum().backward()
    assert watch.backward is not None and watch.backward.module == "chain"  # between its modules
    chain = Chain(steep=False)
    with replay.Watch({"chain": chain}) as watch:
        chain(x).sum().backward()
    assert watch.backward is None


def test_the_step_is_that_of_the_run(manifest, tmp_path):
    """Clips, masks, weights and so the loss, bit for bit, with two batches a step and images."""
    images = render_suite("objects", tmp_path / "objects", splits={"train": 8}, size=32, seed=0)["train"]
    cfg = settings(tmp_path / "run", manifest, optimization={"accumulate": 2}, runtime={"log_every": 2})
    still = dataclasses.replace(cfg.data, datasets=(str(images),), dataset_fpcs=(1,), batch_size=2)
    cfg = dataclasses.replace(cfg, img_data=still)
    whole = train(dataclasses.replace(cfg, folder=str(tmp_path / "whole")), max_steps=4)
    seen = {}

    def loss_alone(step):
        forward = step.plan.forward

        def poisoned(*args):
            out = forward(*args)
            return dataclasses.replace(out, total=out.total * math.nan)

        step.plan.forward = poisoned
        seen["weights"] = {k: v.clone() for k, v in step.state_dict()["encoder"].items()}

    content, cfg = replay.read(failing(cfg, loss_alone, 3))
    assert content["weights_step"] == 2 and len(content["batches"]) == 4
    assert all(torch.equal(v, content["encoder"][k]) for k, v in seen["weights"].items())
    found = replay.replay(content, cfg, "float32")
    rows = [json.loads(x) for x in (whole.folder / "metrics.jsonl").read_text().splitlines()]
    assert rows[1]["step"] == 4 and not found.fails
    single = train(dataclasses.replace(config_of(content), folder=str(tmp_path / "single")), max_steps=3)
    row = [json.loads(x) for x in (single.folder / "metrics.jsonl").read_text().splitlines()][2]
    assert row["step"] == 3 and row["loss"] == found.values["loss"] and row["grad_norm"] == found.values["grad_norm"]


def config_of(content):
    from vjepa_fast import config as configs

    cfg = configs.from_dict(content["config"])
    return dataclasses.replace(cfg, runtime=dataclasses.replace(cfg.runtime, log_every=1))


def test_what_is_no_bundle_is_one_line(nan_weight, tmp_path, capsys):
    damaged = tmp_path / "failure.pt"
    content = torch.load(nan_weight, weights_only=True)
    content["batches"][0]["groups"][0]["clip"][0, 0, 0, 0, 0] ^= 1
    torch.save(content, damaged)
    with pytest.raises(CheckpointError, match=r"batches/0/groups/0/clip is not what was written"):
        bundle.load(damaged)
    (tmp_path / "text.pt").write_text("x")
    torch.save({"step": 3}, tmp_path / "other.pt")
    for name, words in (("none.pt", "no such file"), ("text.pt", "cannot be read"), ("other.pt", "not a bundle")):
        assert main(["replay", str(tmp_path / name)]) == 2
        err = capsys.readouterr().err
        assert err.startswith("error: ") and words in err and err.count("\n") == 1
    assert digests.ENTRY in content and checkpoint.latest(nan_weight.parent) is not None


def test_a_run_that_starts_anew_takes_it_aside(tmp_path):
    for name in ("failure.json", "failure-00000012.pt", "failure-00000012.rank1.pt", "metrics.jsonl", "mine.txt"):
        (tmp_path / name).write_text("")
    run_folder.set_aside(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["mine.txt", "previous-1"]
    assert len(list((tmp_path / "previous-1").iterdir())) == 4


def test_the_failure_is_the_news_where_no_bundle_can_be_written(manifest, tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(bundle, "_batches", lambda *args: 1 / 0)
    path = failing(settings(tmp_path / "run", manifest), planted, 2)
    assert (
        not path.exists() and "warning: no failure-00000002.pt was written: division by zero" in capfd.readouterr().err
    )
