"""Nothing in a step waits for the device. What a GPU would show is shown here without one, in two ways.

On the meta device tensors have shapes but no values, so whatever asks for a value fails: the Python of the models, the
objectives, the gradients, the optimiser and the average. On the CPU the same step runs with values, and a dispatch
mode looks at every operator, also at those inside of our own ops, for one that hands a value to the host.

Left out, for each is different code on a GPU: the check of token indices that the ops make on a CPU only
(`ops._check.in_range`), and drawing the masks (`masks` draws by Triton there; `DrawnMasks` fetches the lengths). The
optimiser of the meta step is not the fused one. With a GPU the last test makes whole steps and torch itself watches.
"""

import dataclasses
import functools
from types import SimpleNamespace

import pytest
import torch
from torch._library.custom_ops import OPDEFS
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from vjepa_fast import ops
from vjepa_fast.ops import _check, linear
from vjepa_fast.trainer.prefetch import Prefetcher, Staged
from vjepa_fast.trainer.step import TrainStep

from .conftest import batch, config

VALUES = {
    "aten::_local_scalar_dense",
    "aten::item",
    "aten::is_nonzero",
    "aten::equal",
    "aten::nonzero",
    "aten::nonzero_static",
    "aten::masked_select",
    "aten::argwhere",
    "aten::unique_consecutive",
    "aten::_unique2",
}
HW = {
    "pred": {},
    "context": {"coeff": 0.5, "warmup": [0, 0], "weight_distance": True},
    "hw": {},
    "fwm_static": {},
    "fwm_orth": {},
    "ld": {"hidden_dim": 8, "hard_weighting": 1.0},
}
REST = {
    "pred": {"loss_exp": 1.5},
    "ac": {"hidden_dim": 8},
    "delta": {},
    "hamiltonian": {"hidden_dim": 8},
    "ltc": {},
    "spectral": {},
    "velgate": {},
    "ld": {"hidden_dim": 8, "hard_weighting": 1.0, "hard_scope": "sample"},
}
ONLINE = {"pred": {}, "kinematic": {"type": "huber"}}
CASES = {
    "headline": {"objectives": HW},
    "rest": {"objectives": REST},
    "clipped": {"optimization": {"clip_grad": 0.1}},
    "online": {"objectives": ONLINE, "target": {"mode": "online"}},
    "images": {"model": {"use_silu": True}},
    "untruncated": {"masks": {"truncate": "none"}, "objectives": HW},
    "untruncated rest": {"masks": {"truncate": "none"}, "objectives": REST},
    "capacity": {"objectives": HW, "runtime": {"capacity_quantum": 16}},
    "capacity rest": {"masks": {"truncate": "none"}, "objectives": REST, "runtime": {"capacity_quantum": 16}},
    "capacity online": {"objectives": ONLINE, "target": {"mode": "online"}, "runtime": {"capacity_quantum": 16}},
}


@functools.cache
def decide():
    linear.has_product()
    TrainStep(config())(batch(), 0)


@pytest.fixture(autouse=True)
def decided_before():
    """What is found out once in a process, such as whether oneDNN serves, is found out before a mode that refuses it:
    the answer is kept for all later tests."""
    decide()


class HostWaits(TorchDispatchMode):
    """Refuses operators whose result, or its shape, depends on values that the host would have to see."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.name().split(".")[0]
        masked = name in ("aten::index", "aten::index_put", "aten::index_put_") and any(
            i is not None and i.dtype == torch.bool for i in args[1]
        )
        if name in VALUES or masked:
            raise AssertionError(f"{name} waits for the device")
        if name.startswith("vjepa_fast::"):  # what it does inside would otherwise be done out of sight
            with self:
                return OPDEFS[name]._init_fn(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


class HostTensors(TorchFunctionMode):
    """Refuses tensors made of host values on the device, and copies between the two: each would be waited for."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        made = func in (torch.tensor, torch.as_tensor, torch.Tensor.new_tensor)
        moved = func in (torch.Tensor.to, torch.Tensor.copy_) and any(
            isinstance(a, torch.Tensor) and a.device.type == "cpu" for a in args
        )
        made = made and not (func is torch.as_tensor and isinstance(args[0], torch.Tensor))
        if (made or moved) and isinstance(out, torch.Tensor) and out.is_meta:
            raise AssertionError(f"{func.__name__} copies from the host to the device")
        return out


def staged(step, data, index, device):
    """The batch as the prefetcher leaves it, on ``device``: masks come from the CPU, their lengths are known."""
    groups, masks = [], []
    for number, group in enumerate(data.groups):
        sampler = step._sampler(group)
        enc, pred = sampler.draw(group.clip, **step._keys(group, number, index)).wait(step.quantum)
        on_device = [[m.to(device) for m in side] for side in (enc, pred)]
        groups.append(dataclasses.replace(group, clip=group.clip.to(device)))
        masks.append(SimpleNamespace(wait=lambda quantum, found=on_device: tuple(found)))
    return Staged(groups, data.step, masks)


def data_of(case, index):
    if case == "images":
        return batch(index, frames=(1,), modality="image")
    return batch(index, frames=(8,))


@pytest.mark.parametrize("case", CASES)
def test_a_step_on_the_meta_device_asks_for_no_value(case):
    device = torch.device("meta")
    step = TrainStep(config(data={"dataset_fpcs": (8,)}, **CASES[case]), device=device)
    batches = [staged(step, data_of(case, i), i, device) for i in range(2)]
    step(batches[0], 0)  # tables of positions are made once and kept
    with HostTensors():
        out = step(batches[1], 1)
    assert out.loss.is_meta and all(p.grad.is_meta for p in step.params if p.grad is not None)


@pytest.mark.parametrize("case", [*CASES, "sigreg", "capacity sigreg", "bfloat16"])
def test_no_operator_of_a_step_hands_a_value_to_the_host(case, monkeypatch):
    sigreg = {"objectives": {"pred": {}, "sigreg": {"num_slices": 8}}}
    sections = {"sigreg": sigreg, "capacity sigreg": {**sigreg, "runtime": {"capacity_quantum": 16}}, "bfloat16": {}}
    dtype = torch.bfloat16 if case == "bfloat16" else torch.float32
    step = TrainStep(config(data={"dataset_fpcs": (8,)}, **{**CASES, **sections}[case]), dtype=dtype)
    step.guard.looks = False  # as on any other device
    data = staged(step, data_of(case, 0), 0, step.device)
    monkeypatch.setattr(_check, "in_range", lambda *args, **kwargs: None)
    before = step.encoder.blocks[0].attn.qkv.weight.detach().clone()
    with ops.use_backend("eager"), HostWaits():
        out = step(data, 0)
    assert torch.isfinite(out.loss) and not torch.equal(step.encoder.blocks[0].attn.qkv.weight, before)


@pytest.mark.parametrize(
    "wait",
    [
        lambda x: x.sum().item(),
        lambda x: bool((x > 0).any()),
        lambda x: x[x > 0],
        lambda x: x.nonzero(),
        lambda x: float(x[0]),
        lambda x: torch.equal(x, x),
        lambda x: x.unique(),
        lambda x: 1 if x[0] > 0 else 2,
        lambda x: x.masked_select(x > 0),
    ],
)
def test_both_ways_see_a_wait(wait):
    with pytest.raises(AssertionError, match="waits for the device"), HostWaits():
        wait(torch.arange(3.0))
    with pytest.raises((RuntimeError, NotImplementedError)):
        wait(torch.arange(3.0, device="meta"))


def test_assignment_by_a_mask_of_bools_is_seen():
    """It looks for the true entries first. Only the dispatch mode sees it: the meta device takes no offence."""
    with pytest.raises(AssertionError, match="waits for the device"), HostWaits():
        torch.arange(3.0)[torch.tensor([True, False, True])] = 0.0


@pytest.mark.parametrize(
    "copy",
    [
        lambda x: torch.tensor([1.0], device=x.device),
        lambda x: x.new_tensor([1.0]),
        lambda x: torch.ones(2).to(x.device),
        lambda x: x.copy_(torch.ones(3)),
        lambda x: torch.as_tensor(1.0, device=x.device),
    ],
)
def test_a_copy_from_the_host_is_seen(copy):
    with pytest.raises(AssertionError, match="from the host to the device"), HostTensors():
        copy(torch.arange(3.0, device="meta"))


def test_waits_inside_of_our_ops_and_in_the_backward_pass_are_seen(monkeypatch):
    """The guard looks into an op (a check of indices is a wait) and follows autograd."""
    step = TrainStep(config())
    data = staged(step, batch(), 0, step.device)
    with pytest.raises(AssertionError, match="waits for the device"), HostWaits():
        step(data, 0)  # in_range is in its place
    monkeypatch.setattr(_check, "in_range", lambda *args, **kwargs: None)
    x = torch.ones(3, requires_grad=True)
    y = x * 2
    y.register_hook(lambda g: g * g.sum().item())
    with pytest.raises(AssertionError, match="waits for the device"), HostWaits():
        y.sum().backward()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch watches a GPU only")
@pytest.mark.parametrize("attention", ["sdpa", "varlen"])
@pytest.mark.parametrize("guided", [False, True])
@pytest.mark.parametrize(("truncate", "quantum"), [("batch", 0), ("none", 0), ("batch", "auto"), ("none", "auto")])
def test_whole_steps_on_a_gpu(attention, guided, truncate, quantum):
    specs = tuple(dataclasses.replace(s, motion_guided=guided) for s in config().masks.specs)
    cfg = config(
        runtime={"device": "cuda", "attention": attention, "compile": False, "capacity_quantum": quantum},
        objectives=HW,
        masks={"specs": specs, "truncate": truncate},
        optimization={"clip_grad": 1.0},
        model={"pred_embed_dim": 48},
    )  # varlen takes heads of 8 n channels
    step = TrainStep(cfg, device="cuda", dtype=torch.bfloat16)
    batches = [batch(i) for i in range(6)]
    for b in batches:
        for group in b.groups:
            group.clip = group.clip.pin_memory()
    feed = Prefetcher([iter(batches)], step.stage, step.device)
    for i in range(6):
        if i == 3:  # kernels are compiled and captured, caches filled
            torch.cuda.synchronize()
            torch.cuda.set_sync_debug_mode("error")
        try:
            out = step(feed.take(i), i)
            if i < 5:
                feed.advance(i + 1)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        assert torch.isfinite(out.loss)
