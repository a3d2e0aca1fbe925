"""``optimization.on_nonfinite``: a step that is not finite stops the run or changes nothing, in every form of it."""

import dataclasses
import json
import math
import shutil

import pytest
import torch

from vjepa_fast import ops
from vjepa_fast.errors import ConfigError, TrainingError
from vjepa_fast.trainer import TrainStep, captured, checkpoint, train
from vjepa_fast.trainer import trainer as loop

from .conftest import batch, config
from .recorder import capture
from .test_distributed import launch

SKIP = {"on_nonfinite": "skip", "max_skips": 2}
VOLATILE = ("clips_per_s", "tokens_per_s", "step_flops", "mfu", "peak_memory_mb", "data_wait", "save_wait")


def poison(step):
    """A tensor by which the step's losses are multiplied."""
    factor, forward = torch.ones(()), step.plan.forward

    def changed(*args):
        out = forward(*args)
        return dataclasses.replace(out, total=out.total * factor)

    step.plan.forward = changed
    return factor


def everything(step):
    """All that a checkpoint holds of a step, copied."""
    state = step.state_dict()
    parts = {f"{n}/{k}": v.clone() for n in ("encoder", "predictor", "target_encoder") for k, v in state[n].items()}
    parts |= {f"heads/{k}": v.clone() for k, v in state["heads"].items()}
    for n, moments in state["opt"]["state"].items():
        parts |= {f"opt/{n}/{k}": torch.as_tensor(v).clone() for k, v in moments.items()}
    return parts | {"scale": torch.tensor(state["scaler"]["scale"])}


def differing(a, b):
    return [k for k in a if not torch.equal(a[k], b[k])]


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize(
    ("dtype", "sections"),
    [
        (torch.float32, {}),
        (torch.float32, {"optimization": {"clip_grad": 0.1}}),
        (torch.float32, {"target": {"mode": "online"}, "objectives": {"pred": {}, "kinematic": {}}}),
        (torch.bfloat16, {}),
        (torch.float16, {}),
    ],
)
def test_a_skipped_step_changes_nothing(dtype, sections, value):
    sections = {**sections, "optimization": {**SKIP, **sections.get("optimization", {})}}
    step = TrainStep(config(**sections), dtype=dtype)
    factor = poison(step)
    step(batch(0), 0)
    before = everything(step)
    factor.fill_(value)
    out = step(batch(1), 1)
    assert not (out.loss.isfinite() and out.grad_norm.isfinite())
    assert differing(before, everything(step)) == [] and len(before) > 50
    factor.fill_(1.0)
    assert step(batch(2), 2).loss.isfinite() and len(differing(before, everything(step))) > 20
    if step.low is not None:
        assert all(torch.equal(low, full.to(dtype)) for low, full in zip(step.low.low, step.low.full))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_by_default_weights_stay_those_before_the_failed_step(dtype):
    """On a CPU, where looking costs nothing, until the run ends."""
    step = TrainStep(config(), dtype=dtype)
    factor = poison(step)
    step(batch(0), 0)
    before = everything(step)
    factor.fill_(math.nan)
    step(batch(1), 1)
    factor.fill_(1.0)
    assert step(batch(2), 2).loss.isfinite()
    assert step.guard.failed and differing(before, everything(step)) == []


def test_one_of_several_batches_is_enough():
    step = TrainStep(config(optimization={**SKIP, "accumulate": 2}))
    factor, forward, calls = poison(step), step.plan.forward, [0]

    def second_alone(*args):
        calls[0] += 1
        factor.fill_(math.nan if calls[0] == 4 else 1.0)
        return forward(*args)

    step.plan.forward = second_alone
    step([batch(0), batch(1)], 0)
    before = everything(step)
    step([batch(2), batch(3)], 1)
    assert calls[0] == 4 and differing(before, everything(step)) == []


@pytest.mark.parametrize("form", [captured.Whole, captured.Part])
def test_captured_steps_skip_without_the_host(form):
    """The decision is part of the graph: a replay of it skips or not by what it computes."""
    runtime, optimization = {"capacity_quantum": 96}, {**SKIP, "weight_decay": 0.1, "clip_grad": 1.0}
    step = TrainStep(config(runtime=runtime, optimization=optimization))
    factor = poison(step)
    step.capture(form(step))
    step.captured.graphs.capture = capture
    with ops.use_backend("eager"):
        for i in range(5):
            step(batch(0), i)
        graphs = step.captured.graphs
        replays, before = graphs.replays, everything(step)
        assert replays > 0
        factor.fill_(math.nan)
        out = step(batch(0), 5)
        assert not out.grad_norm.isfinite() and graphs.replays == replays + 1
        changed = differing(before, everything(step))
        assert {name.split("/")[-1] for name in changed} <= {"step"}
        factor.fill_(1.0)
        step(batch(0), 6)
    after = everything(step)
    assert len(differing(before, after)) > 20 and all(v.isfinite().all() for v in after.values())


@pytest.mark.parametrize("clip", [None, 0.5])
def test_the_device_decides_for_adamw_and_the_average(clip):
    """As on CUDA, where the host does not look: parameters, moments, targets, and what follows without gradient."""
    for go in (True, False):
        results = []
        for given in ({"go": torch.tensor(go)}, {}):
            step = TrainStep(config())
            step(batch(0), 0)
            step.gradients.begin()
            out, _ = step.losses(batch(1), 1)
            (out.total * (math.nan if not go and given else 1.0)).backward()
            step.encoder.blocks[0].norm1.weight.grad = None  # its target follows all the same, or does not
            before = everything(step)
            if go or given:
                scale = None if clip is None else torch.tensor(clip)
                with ops.use_backend("eager"):
                    step.optimizer.step(average=step.average, momentum=0.9, scale=scale, **given)
            results.append(everything(step))
            if not go:
                assert {name.split("/")[-1] for name in differing(before, results[-1])} <= {"step"}
        assert not go or differing(*results) == []


def test_muon_skips_too():
    pytest.importorskip("timm", "1.0.21")
    step = TrainStep(config(optimization={**SKIP, "name": "muon"}))
    factor = poison(step)
    step(batch(0), 0)
    before = everything(step)
    factor.fill_(math.inf)
    step(batch(1), 1)
    assert differing(before, everything(step)) == []


def test_only_where_it_can():
    from vjepa_fast import config as configs

    with pytest.raises(ConfigError, match=r"optimization.on_nonfinite: skip is not supported under method: levjepa"):
        configs.load("levjepa_small", ["optimization.on_nonfinite=skip", "data.datasets=[x.csv]"])


def run(folder, manifest, bad, **kw):
    """A run whose steps ``bad`` (from 1) are not finite."""
    optimization = {**SKIP, **kw.pop("optimization", {})}
    cfg = config(folder, data={"datasets": (str(manifest),)}, optimization=optimization, **kw)
    one = loop.Trainer._one

    def poisoned(self, feed, end, *, stop):
        if not hasattr(self, "factor"):
            self.factor = poison(self.step)
        self.factor.fill_(math.nan if self.done + 1 in bad else 1.0)
        return one(self, feed, end, stop=stop)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop.Trainer, "_one", poisoned)
        return train(cfg)


def rows(folder):
    found = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if k not in VOLATILE} for row in found]


def test_skips_are_counted_and_left_out_of_the_means(tmp_path, manifest):
    every = rows(run(tmp_path / "every", manifest, {2, 5, 6, 8}).folder)
    assert [(r["step"], r["skipped"]) for r in every] == [
        (1, 0), (3, 1), (4, 0), (7, 2), (9, 1), (10, 0), (11, 0), (12, 0)
    ]  # fmt: skip
    third = rows(run(tmp_path / "third", manifest, {2, 5, 6, 8}, runtime={"log_every": 3}).folder)
    assert [(r["step"], r["skipped"]) for r in third] == [(3, 1), (6, 2), (9, 1), (12, 0)]
    assert third[0]["loss"] == pytest.approx((every[0]["loss"] + every[1]["loss"]) / 2)
    assert third[1]["loss"] == every[2]["loss"]


def test_too_many_in_a_row_end_the_run(tmp_path, manifest):
    with pytest.raises(
        TrainingError, match=r"step 6: not finite: loss=nan.*more than 2 steps in a row.*max_skips"
    ) as e:
        run(tmp_path / "run", manifest, {4, 5, 6, 7}, runtime={"log_every": 5, "save_every": 3})
    assert "\n" not in str(e.value) and json.loads((tmp_path / "run" / "failure.json").read_text())["step"] == 6
    assert checkpoint.load(tmp_path / "run")["step"] == 3


def test_a_run_that_goes_on_skips_and_counts_alike(tmp_path, manifest):
    bad, options = {2, 3, 5, 6, 9}, {"runtime": {"log_every": 4, "save_every": 1, "keep_checkpoints": 99}}
    whole = run(tmp_path / "whole", manifest, bad, **options)
    want = checkpoint.load(whole.checkpoint)["encoder"]
    for stop_at in (2, 3, 5, 6):
        folder = shutil.copytree(whole.folder, tmp_path / f"part{stop_at}")
        for path in checkpoint.all_in(folder):
            if checkpoint.step_of(path) > stop_at:
                path.unlink()
        part = run(folder, manifest, bad, **options)
        assert rows(part.folder) == rows(whole.folder), stop_at
        got = checkpoint.load(part.checkpoint)["encoder"]
        assert all(torch.equal(v, got[k]) for k, v in want.items()), stop_at


def test_too_many_in_a_row_are_counted_across_a_stop(tmp_path, manifest):
    runtime = {"save_every": 1, "keep_checkpoints": 99, "log_every": 2}  # step 4 is in a row before the stop
    options = {"runtime": runtime, "optimization": {"max_skips": 4}}
    whole = run(tmp_path / "run", manifest, {4, 5, 6}, **options)
    for path in checkpoint.all_in(whole.folder):
        if checkpoint.step_of(path) > 5:
            path.unlink()
    with pytest.raises(TrainingError, match="step 8: .*more than 4 steps in a row"):
        run(tmp_path / "run", manifest, {6, 7, 8}, **options)


RANKS = """
import math, sys
import torch
torch.set_num_threads(1)
from tests.trainer.conftest import batch
from tests.trainer.test_nonfinite import differing, everything, poison
from vjepa_fast import config
from vjepa_fast.trainer.distributed import Distributed
from vjepa_fast.trainer.step import TrainStep
world = Distributed.from_env("cpu")
step = TrainStep(config.load(sys.argv[1]), world=world)
factor = poison(step)
step(batch(0, seed=world.rank), 0)
before = everything(step)
forward = step.plan.forward
def loss_alone(*args):  # its gradients are finite, and it is not
    out = forward(*args)
    out.total.data.fill_(math.inf)
    return out
if world.rank == 1:
    step.plan.forward = loss_alone
step(batch(1, seed=world.rank), 1)
skipped = differing(before, everything(step))
step.plan.forward = forward
step(batch(2, seed=world.rank), 2)
torch.save({"skipped": skipped, "then": len(differing(before, everything(step))), "all": everything(step)}, sys.argv[2])
world.close()
"""


def test_all_processes_skip_where_one_has_to(tmp_path):
    _, codes, errors, outs = launch(config(optimization=SKIP), tmp_path, "ranks", RANKS)
    assert codes == [0, 0], errors
    a, b = (torch.load(path) for path in outs)
    assert a["skipped"] == b["skipped"] == [] and a["then"] == b["then"] > 20 and differing(a["all"], b["all"]) == []
