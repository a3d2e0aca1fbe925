"""``optimization.spike_std``, against the rule in numpy: which steps are skipped, what changes then, what is kept."""

import json
import math
import shutil

import numpy as np
import pytest
import torch

from vjepa_fast import config as configs
from vjepa_fast import ops
from vjepa_fast.errors import CheckpointError, ConfigError, TrainingError
from vjepa_fast.trainer import TrainStep, captured, checkpoint, nonfinite, progress, spikes, train
from vjepa_fast.trainer import trainer as loop

from .conftest import batch, config
from .ranks import launch_all
from .recorder import capture
from .test_no_sync import HostTensors, staged
from .test_nonfinite import differing, everything, poison, rows

STEPS = 30
# at 7 no epoch for it, at 13 not far enough with 7 in the window; 20 and 21 in a row
PLANTED = {7: 30.0, 13: 1.3, 20: 9.0, 21: 9.0, 26: 4.0, 28: 1000.0}
EXPECTED = [20, 21, 26, 28]
SPIKES = {
    "epochs": 10, "ipe": 4, "lr": 1e-4, "start_lr": 1e-4, "spike_std": 3.0, "spike_window": 12, "spike_after_epoch": 1
}  # fmt: skip


class Rule:
    """The rule, step by step, on the host."""

    def __init__(self, std, window, after):
        self.std, self.window, self.after, self.kept, self.total = std, window, after, [], 0

    def __call__(self, loss, epoch):
        """(is a spike, bound)."""
        bound = np.mean(self.kept) + self.std * np.std(self.kept) if self.kept else math.nan
        if not math.isfinite(loss):
            return False, bound
        if loss > bound and epoch > self.after and len(self.kept) > int(0.5 * self.window):
            self.total += 1
            return True, bound
        self.kept = [*self.kept, loss][-self.window :]
        return False, bound


def kept(found):
    """The losses of `Spikes`, the oldest first."""
    count, window = int(found.count), found.window
    return [float(found.losses[n % window]) for n in range(max(0, count - window), count)]


def make(form=None, dtype=torch.float32, **sections):
    sections = {**sections, "optimization": {**SPIKES, **sections.get("optimization", {})}}
    if form is not None:
        sections["runtime"] = {"capacity_quantum": 96}
    step = TrainStep(config(**sections), dtype=dtype)
    factor = poison(step)
    if form is not None:
        step.capture(form(step))
        step.captured.graphs.capture = capture
    return step, factor


def follow_the_rule(step, factor, planted, steps=STEPS, data=batch):
    """Make steps; at each everything is as the rule has it. Returns the spikes."""
    cfg, average = step.cfg.optimization, step.average
    rule, found = Rule(cfg.spike_std, cfg.spike_window, cfg.spike_after_epoch), []
    after = everything(step)
    for i in range(steps):
        factor.fill_(planted.get(i, 1.0))
        before, target = after, [p.clone() for p in step.target_encoder.parameters()]
        out = step(data(i % 3), i)
        spiked, bound = rule(float(out.loss), step.schedules.epoch(i))
        mine = out.spike.tolist()
        assert (bool(mine[0]), mine[2]) == (spiked, rule.total), i
        assert mine[1] == pytest.approx(bound, rel=1e-12, nan_ok=True)
        assert kept(step.guard.spikes) == rule.kept
        changed = differing(before, after := everything(step))
        if math.isfinite(float(out.loss)) and not spiked:
            assert len(changed) > 20
            continue
        moved = {name for name in changed if name.startswith("target_encoder/")}
        assert {name.split("/")[-1] for name in changed if name not in moved} <= {"step"}
        if spiked and step.cfg.compat == "published" and average is not None:
            momentum = step.schedules.momentum(i)
            wanted = [t.lerp(p, 1 - momentum) for t, p in zip(target, step.encoder.parameters())]
            assert moved
            torch.testing.assert_close(list(step.target_encoder.parameters()), wanted, rtol=1e-6, atol=1e-8)
        else:
            assert not moved
        if spiked:
            found.append(i)
            assert out.grad_norm.isfinite() and out.momentum == step.schedules.momentum(i)
    if step.low is not None:
        assert all(torch.equal(low, full.to(low.dtype)) for low, full in zip(step.low.low, step.low.full))
    return found


@pytest.mark.parametrize("window", [1, 2, 5, 12])
def test_many_losses(window):
    """Of 400, some of them far off, not finite, or of a step whose gradients are not."""
    drawn, count = np.random.default_rng(window), 400
    losses = np.float32(1 + 0.1 * drawn.standard_normal(count) + 2.0 * (drawn.random(count) < 0.15))
    losses[drawn.random(count) < 0.05] = math.nan
    cfg = configs.schema.OptimizationConfig(spike_std=1.5, spike_window=window, spike_after_epoch=1)
    ours, rule, spiked = spikes.Spikes(cfg), Rule(1.5, window, 1), []
    for i, loss in enumerate(losses):
        overflow = drawn.random() < 0.05
        ours.begin(i // 3)  # the first that can be one is step 6
        go = ours.decide(torch.tensor(loss), torch.tensor(math.inf if overflow else 1.0))
        spiked.append(rule(math.nan if overflow else float(loss), i // 3)[0])
        assert (bool(go), float(ours.last[0]), float(ours.last[2])) == (not spiked[-1], spiked[-1], rule.total)
        assert kept(ours) == rule.kept
    assert 20 < rule.total < 380 and len(rule.kept) == window


def test_no_spike_before_more_than_half_of_the_window_is_there():
    cfg = configs.schema.OptimizationConfig(spike_std=1.0, spike_window=9, spike_after_epoch=-1)
    for number, is_spike in ((4, False), (5, True)):
        ours = spikes.Spikes(cfg)
        ours.begin(0)
        for i in range(number):
            assert ours.decide(torch.tensor(1.0 - 0.01 * i), None)
        assert bool(ours.decide(torch.tensor(9.0), None)) != is_spike


def two(i):
    return [batch(i), batch(i, first=3)]


CASES = {
    "plain": {},
    "published": {"compat": "published"},
    "clipping": {"optimization": {"clip_grad": 0.1}},
    "skips too": {"optimization": {"on_nonfinite": "skip"}},
    "online": {"target": {"mode": "online"}, "objectives": {"pred": {}, "kinematic": {}}},
}


@pytest.mark.parametrize("case", CASES)
def test_steps_follow_the_rule(case):
    planted = {**PLANTED, **({24: math.nan, 25: math.inf} if case == "skips too" else {})}
    assert follow_the_rule(*make(**CASES[case]), planted) == EXPECTED


@pytest.mark.parametrize("compat", ["intended", "published"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_in_mixed_precision(dtype, compat):
    step, factor = make(dtype=dtype, compat=compat)
    assert follow_the_rule(step, factor, PLANTED) == EXPECTED


def test_a_spike_whose_gradients_overflow_leaves_the_scale():
    step, factor = make(dtype=torch.float16)
    for i in range(15):
        step(batch(i % 3), i)
    before = everything(step)
    factor.fill_(1e30)
    out = step(batch(0), 15)
    assert out.spike[0] == 1 and out.grad_norm == 0 and differing(before, everything(step)) == []


def test_of_accumulated_batches_their_mean_counts():
    step, factor = make(optimization={"accumulate": 2})
    assert follow_the_rule(step, factor, PLANTED, data=two) == EXPECTED


@pytest.mark.parametrize("compat", ["intended", "published"])
def test_muon(compat):
    pytest.importorskip("timm", "1.0.21")
    step, factor = make(optimization={"name": "muon", "lr": 1e-5, "start_lr": 1e-5}, compat=compat)
    assert follow_the_rule(step, factor, PLANTED, steps=25) == [20, 21]


@pytest.mark.parametrize("compat", ["intended", "published"])
@pytest.mark.parametrize("form", [captured.Whole, captured.Part])
def test_captured_steps_follow_the_rule(form, compat):
    """The decision is part of the graph, that of the epoch too: graphs of epochs without spikes have them later."""
    step, factor = make(form, compat=compat)
    with ops.use_backend("eager"):
        assert follow_the_rule(step, factor, PLANTED) == EXPECTED
    graphs = step.captured.graphs
    assert not graphs.off and graphs.replays > STEPS - 8 > 3 >= len(graphs.captured)


def test_nobody_waits_for_the_decision():
    device = torch.device("meta")
    for compat in ("intended", "published"):
        step = TrainStep(config(optimization=SPIKES, compat=compat), device=device)
        batches = [staged(step, batch(i), i, device) for i in (0, 8, 9)]
        step(batches[0], 0)
        with HostTensors():
            outs = [step(batches[1], 8), step(batches[2], 9)]
        assert all(out.spike.is_meta for out in outs)


def test_off_nothing_of_it_is_there(monkeypatch):
    def refuse(*_):
        raise AssertionError("made")

    monkeypatch.setattr(nonfinite, "Spikes", refuse)
    step = TrainStep(config())
    assert step(batch(0), 0).spike is None and "spikes" not in step.state_dict()
    step.guard.looks = False  # as on CUDA
    assert step.guard.go([torch.ones(())], torch.ones(())) is None
    assert not any("spike" in key for key in configs.to_dict(config())["optimization"])
    monkeypatch.undo()
    with pytest.raises(ConfigError, match="optimization.spike_std: is not supported under method: levjepa"):
        configs.load("levjepa_small", ["optimization.spike_std=3", "data.datasets=[x.csv]"])


def test_a_step_that_is_given_up_leaves_no_loss(monkeypatch):
    """Once its loss is kept it cannot be given up: the run that goes on would have it twice."""
    step, _ = make()
    step(batch(0), 0)

    def given_up():
        raise KeyboardInterrupt

    monkeypatch.setattr(spikes, "weights_change", given_up)
    before = kept(step.guard.spikes)
    with pytest.raises(KeyboardInterrupt):
        step(batch(1), 1)
    assert kept(step.guard.spikes) == before and len(before) == 1


@pytest.mark.parametrize("window", [3, 5, 8, 20])
@pytest.mark.parametrize("count", [0, 2, 8, 19])
def test_of_another_window_the_newest_losses_stay(window, count):
    cfg = config(optimization=SPIKES).optimization
    a, b = (spikes.Spikes(configs.schema.OptimizationConfig(spike_std=2, spike_window=n)) for n in (8, window))
    for i in range(count):
        a.decide(torch.tensor(float(i)), None)
    addresses = [x.data_ptr() for x in (b.losses, b.count, b.total)]
    b.load_state_dict(a.state_dict())
    assert kept(b) == kept(a)[-window:]
    b.decide(torch.tensor(99.0), None)
    assert kept(b) == [*kept(a), 99.0][-window:]
    assert [x.data_ptr() for x in (b.losses, b.count, b.total)] == addresses and cfg.spike_window == 12
    b.load_state_dict(None)
    assert kept(b) == [] and b.total == 0


# -- whole runs --------------------------------------------------------------------------------------------------------
BAD = {8: 20.0, 9: 20.0, 10: 20.0, 13: 20.0, 16: 20.0}  # steps from 1


def run(folder, manifest, planted, end=None, **kw):  # noqa: F811
    optimization = {**SPIKES, "epochs": 5, "spike_window": 6, "spike_after_epoch": 0, **kw.pop("optimization", {})}
    cfg = config(folder, data={"datasets": (str(manifest),)}, optimization=optimization, **kw)
    one = loop.Trainer._one

    def poisoned(self, feed, end, *, stop):
        if not hasattr(self, "factor"):
            self.factor = poison(self.step)
        self.factor.fill_(planted.get(self.done + 1, 1.0))
        return one(self, feed, end, stop=stop)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop.Trainer, "_one", poisoned)
        return train(cfg, max_steps=end)


def test_rows_count_spikes_and_leave_them_out(tmp_path, manifest, capsys):  # noqa: F811
    every = rows(run(tmp_path / "every", manifest, BAD, end=18).folder)
    assert [(r["step"], r["spikes"]) for r in every if r["spikes"]] == [(11, 3), (14, 1), (17, 1)]
    assert len(every) == 18 - len(BAD) and max(r["loss"] for r in every) < 5
    assert capsys.readouterr().err.count("spikes skipped 3") == 1
    fourth = rows(run(tmp_path / "fourth", manifest, BAD, end=16, runtime={"log_every": 4}).folder)
    assert [(r["step"], r["spikes"]) for r in fourth] == [(4, 0), (8, 1), (12, 2), (16, 2)]
    steps = {r["step"]: r["loss"] for r in every}
    assert fourth[1]["loss"] == pytest.approx(np.mean([steps[n] for n in (5, 6, 7)]))
    assert "spikes" not in progress.summary({**every[0], "clips_per_s": 1.0, "data_wait": 0.0})


@pytest.mark.parametrize("stop_at", [5, 9, 10, 14])
def test_a_run_that_goes_on_decides_alike(tmp_path, manifest, stop_at):  # noqa: F811
    """To the last bit, in the middle of spikes and of a row too."""
    options = {"runtime": {"log_every": 4, "save_every": 1, "keep_checkpoints": 99}, "end": 18}
    whole = run(tmp_path / "whole", manifest, BAD, **options)
    shutil.copytree(whole.folder, tmp_path / "part")
    for path in checkpoint.all_in(tmp_path / "part"):
        if checkpoint.step_of(path) > stop_at:
            path.unlink()
    part = run(tmp_path / "part", manifest, BAD, **options)
    assert rows(part.folder) == rows(whole.folder)
    a, b = checkpoint.load(whole.checkpoint), checkpoint.load(part.checkpoint)
    assert a["spikes"]["total"] == 5 and a["spikes"]["count"] == 13
    for name in ("encoder", "target_encoder", "spikes"):
        assert all(torch.equal(v, b[name][k]) for k, v in a[name].items())


def test_too_many_in_all_end_the_run(tmp_path, manifest):  # noqa: F811
    """Those before a stop count; the run ends with the step, its loss, its bound and its samples."""
    options = {"optimization": {"max_spikes": 4}, "runtime": {"save_every": 5, "log_every": 2}}
    run(tmp_path / "run", manifest, BAD, end=14, **options)
    with pytest.raises(TrainingError) as info:
        run(tmp_path / "run", manifest, BAD, **options)
    said, failure = str(info.value), json.loads((tmp_path / "run" / "failure.json").read_text())
    assert "\n" not in said and said.startswith("step 16: loss ") and "5 steps were skipped so, more than" in said
    assert "max_spikes (4); samples: " in said and ".mp4" in said and "lower optimization.lr" in said
    assert failure["step"] == 16 and len(failure["samples"]) == 3
    assert float(failure["values"]["loss"]) > 2 * float(failure["values"]["bound"])
    assert checkpoint.load(tmp_path / "run")["step"] == 15
    run(tmp_path / "more", manifest, BAD, end=18, optimization={"max_spikes": 5})


def test_checkpoints_without_it_and_with_a_wrong_one(tmp_path, manifest):  # noqa: F811
    before = run(tmp_path / "run", manifest, {}, end=3, optimization={"spike_std": None}, runtime={"log_every": 2})
    assert "spikes" not in checkpoint.load(before.checkpoint)
    run(tmp_path / "run", manifest, BAD, end=12, runtime={"log_every": 2})
    good = checkpoint.load(tmp_path / "run")
    assert good["spikes"]["count"] == 6 and good["spikes"]["total"] == 3  # from step 4 on, at which nothing is known
    run(tmp_path / "run", manifest, {}, end=13, optimization={"spike_std": None})
    for key, value in {"losses": torch.tensor([math.nan]), "count": torch.tensor(-1), "total": torch.ones(2)}.items():
        bad = {**good, "spikes": {**good["spikes"], key: value}}
        (tmp_path / "bad").mkdir(exist_ok=True)
        with pytest.raises(CheckpointError, match="spikes: expected losses that are finite, and counts"):
            checkpoint.load(checkpoint.save(tmp_path / "bad", bad))


RANKS = """
import sys
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
planted = {15: (1.0, 9.0), 18: (0.1, 1.7), 22: (9.0, 1.0)}  # 18 is a spike of the second alone
losses, spikes, changed = [], [], []
for i in range(24):
    factor.fill_(planted.get(i, (1.0, 1.0))[world.rank])
    before = everything(step)
    out = step(batch(i % 3, seed=world.rank), i)
    losses.append(float(out.loss))
    spikes.append(out.spike.tolist())
    changed.append(len(differing(before, everything(step))))
torch.save({"losses": losses, "spikes": spikes, "changed": changed, "ring": step.guard.spikes.state_dict(),
            "all": everything(step)}, sys.argv[2])
world.close()
"""


def test_processes_decide_together(tmp_path):
    runs = [(config(optimization=SPIKES), "ddp", 2)]
    runs += [(config(optimization=SPIKES, runtime={"parallel": "fsdp"}), "fsdp", 2)]
    for cfg, codes, errors, outs in launch_all(runs, tmp_path, RANKS):
        assert codes == [0, 0], errors
        a, b = (torch.load(path) for path in outs)
        assert a["losses"] != b["losses"] and all(torch.equal(v, b["ring"][k]) for k, v in a["ring"].items())
        together, alone = (Rule(3.0, 12, 1) for _ in range(2))
        found = [together((x + y) / 2, i // 4)[0] for i, (x, y) in enumerate(zip(a["losses"], b["losses"]))]
        own = [alone(y, i // 4)[0] for i, y in enumerate(b["losses"])]
        assert [i for i, spiked in enumerate(found) if spiked] == [15, 22] and own[18] and not own[22]
        for rank in (a, b):
            assert [bool(x[0]) for x in rank["spikes"]] == found
        assert [n == 0 for n in a["changed"]] == found
        if cfg.runtime.parallel != "fsdp":  # of those the first process alone has the state
            assert differing(a["all"], b["all"]) == []
