"""The optimisers: ours against torch's AdamW, state that goes both ways, the average, Muon by config."""

import copy

import pytest
import timm.optim
import torch
from torch import nn

from vjepa_fast import models
from vjepa_fast.config.schema import OptimizationConfig
from vjepa_fast.errors import CheckpointError, ConfigError
from vjepa_fast.trainer import optim
from vjepa_fast.trainer.step import TrainStep

from .conftest import batch, config

CPU = torch.device("cpu")


class Net(nn.Module):
    def __init__(self, seed=0):
        super().__init__()
        gen = torch.Generator().manual_seed(seed)
        self.wide, self.late, self.norm = nn.Linear(40, 70), nn.Linear(70, 5), nn.LayerNorm(5)
        self.frozen = nn.Parameter(torch.ones(3), requires_grad=False)
        self.register_buffer("seen", torch.zeros(2))
        for p in self.parameters():
            p.data = torch.randn(p.shape, generator=gen)


def gradients(net, step):
    """Random ones; the layer `late` has none at every other step, `norm` has none before step 3."""
    gen = torch.Generator().manual_seed(step)
    for name, p in net.named_parameters():
        g = torch.randn(p.shape, generator=gen)
        off = not p.requires_grad or ("late" in name and step % 2) or ("norm" in name and step < 3)
        p.grad = None if off else g


def ours(net):
    return optim.build_optimizer({"encoder": net}, OptimizationConfig(lr=1e-2, weight_decay=0.1), CPU)


def theirs(net):
    return torch.optim.AdamW(optim.parameter_groups({"encoder": net}, 0.1), lr=1e-2)


@torch.no_grad()
def moved(target, source, momentum):
    for t, s in zip(target.parameters(), source.parameters()):
        t.mul_(momentum).add_(s, alpha=1 - momentum)


def same(a, b):
    torch.testing.assert_close(dict(a.named_parameters()), dict(b.named_parameters()), rtol=1e-5, atol=1e-6)


def test_several_steps_with_schedules_and_missing_gradients_are_those_of_torch():
    a, b = Net(), Net()
    target, average = Net(1), optim.Average(a, Net(1))
    one, two = ours(a), theirs(b)
    for step in range(6):
        for net, opt in ((a, one), (b, two)):
            gradients(net, step)
            optim.set_schedule(opt, 1e-2 / (step + 1), 0.1 * step)
        a.seen += step
        norm = optim.gradient_norm(optim.parameters(one))
        torch.testing.assert_close(norm, torch.nn.utils.clip_grad_norm_(b.parameters(), 5.0))
        optim.update(one, average, 0.9, norm, 5.0)
        two.step()
        moved(target, a, 0.9)
        same(a, b)
        same(average.target, target)
        assert torch.equal(average.target.seen, a.seen)
    counts = [{k: float(s["step"]) for k, s in opt.state_dict()["state"].items()} for opt in (one, two)]
    assert counts[0] == counts[1] and set(counts[0].values()) == {3.0, 6.0}


def test_the_average_moves_everything_also_what_has_no_gradient():
    net, target = Net(), Net(1)
    low = models.LowCopy(target, torch.bfloat16)
    expected, average = copy.deepcopy(target), optim.Average(net, target, low)
    optimizer = ours(net)
    gradients(net, 1)
    optim.update(optimizer, average, 0.75, torch.zeros(()), None)
    moved(expected, net, 0.75)
    same(target, expected)
    assert not torch.equal(target.frozen, Net(1).frozen) and not torch.equal(target.late.weight, Net(1).late.weight)
    assert all(torch.equal(a, b.bfloat16()) for a, b in zip(low.low, low.full)) and len(low.low) == 4


def test_the_average_as_a_pass_of_its_own():
    """As with Muon."""
    net, target = Net(), Net(1)
    net.seen += 3
    low, expected = models.LowCopy(target, torch.bfloat16), copy.deepcopy(target)
    average = optim.Average(net, target, low)
    for momentum in (0.75, 1.0, 0.0):
        average.follow(momentum)
        moved(expected, net, momentum)
        same(target, expected)
        assert torch.equal(target.seen, net.seen) and not any(p.grad_fn for p in target.parameters())
        assert all(torch.equal(a, b.bfloat16()) for a, b in zip(low.low, low.full)) and len(low.low) == 4
    average.follow(0.9)  # equal parameters stay equal to the last bit
    assert all(torch.equal(a, b) for a, b in zip(target.parameters(), net.parameters()))


def test_a_target_of_another_architecture_is_refused():
    with pytest.raises(ValueError):
        optim.Average(Net(), nn.Linear(2, 2))


@pytest.mark.parametrize(("first", "second"), [(ours, theirs), (theirs, ours), (ours, ours)])
def test_state_goes_from_torch_to_us_and_back(first, second, tmp_path):
    a, b = Net(), Net()
    one, two = first(a), theirs(b)
    for step in range(4):
        for net, opt in ((a, one), (b, two)):
            gradients(net, step)
            opt.step()
    torch.save(one.state_dict(), tmp_path / "opt.pt")
    again = second(a)
    again.load_state_dict(torch.load(tmp_path / "opt.pt", weights_only=True))
    for step in range(4, 7):
        for net, opt in ((a, again), (b, two)):
            gradients(net, step)
            opt.step()
    same(a, b)


def muon(**values):
    return config(optimization={"name": "muon", **values}, objectives={"pred": {}, "ld": {"hidden_dim": 8}})


def test_muon_takes_the_matrices_of_the_blocks_only():
    step = TrainStep(muon())
    groups = step.optimizer.param_groups
    taken = {p for g in groups if g["use_muon"] for p in g["params"]}
    names = {
        f"{part}.{k}": p
        for part in ("encoder", "predictor", "plan")
        for k, p in getattr(step, part).named_parameters()
        if p.requires_grad
    }
    expected = {k for k in names if "blocks." in k and k.endswith("weight") and names[k].ndim == 2}
    assert {k for k, p in names.items() if p in taken} == expected and len(expected) == 4 * (4 + 2)
    assert sum(len(g["params"]) for g in groups) == len(names)
    assert all((g["nesterov"], g["eps"] == 1e-8) == (g["use_muon"], not g["use_muon"]) for g in groups)
    optim.set_schedule(step.optimizer, 0.25, 0.125)
    assert {g["lr"] for g in groups} == {0.25}
    assert all(g["weight_decay"] == (0.0 if g["WD_exclude"] else 0.125) for g in groups)


def test_muon_makes_steps_of_orthogonal_matrices_and_adamw_the_rest():
    free, held = (
        TrainStep(muon(weight_decay=0.0, final_weight_decay=0.0)),
        TrainStep(config(optimization={"weight_decay": 0.0, "final_weight_decay": 0.0}, objectives=muon().objectives)),
    )
    before = free.encoder.blocks[0].attn.proj.weight.detach().clone()
    out = free(batch(), 0)
    held(batch(), 0)
    moved = (free.encoder.blocks[0].attn.proj.weight.detach() - before) / (out.lr * 0.2 * 48**0.5)
    values = torch.linalg.svdvals(moved)  # 0.2 sqrt(width): steps as long as those of AdamW (arXiv:2502.16982)
    raw = torch.linalg.svdvals(free.encoder.blocks[0].attn.proj.weight.grad)
    assert values[:6].min() > 0.8 and values.max() < 1.25 and raw[5] < 0.5 * raw[0]
    for name in ("norm1.weight", "attn.qkv.bias"):
        a, b = (s.encoder.blocks[0].get_parameter(name) for s in (free, held))
        torch.testing.assert_close(a, b)
    torch.testing.assert_close(free.encoder.patch_embed.proj.weight, held.encoder.patch_embed.proj.weight)
    assert not torch.equal(free.target_encoder.blocks[0].attn.proj.weight, before)  # the average follows


def test_muon_resumes_exactly_and_only_with_muon():
    whole, first, second = TrainStep(muon()), TrainStep(muon()), TrainStep(muon(lr=3e-3))
    for i in range(4):
        whole(batch(i), i)
        if i < 2:
            first(batch(i), i)
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    second.schedules = first.schedules
    for i in (2, 3):
        second(batch(i), i)
    for a, b in zip(whole.params, second.params):
        assert torch.equal(a, b)
    with pytest.raises(CheckpointError, match="optimiser state does not fit"):
        TrainStep(config(objectives=muon().objectives)).load_state_dict(first.state_dict())


def test_muon_needs_a_timm_that_has_it(monkeypatch):
    monkeypatch.delattr(timm.optim, "Muon")
    with pytest.raises(ConfigError, match=r"optimization.name: muon needs timm 1\.0\.21"):
        TrainStep(muon())
