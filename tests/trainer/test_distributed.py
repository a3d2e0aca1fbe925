"""Two gloo processes on the CPU against one process with the batch of both."""

import dataclasses
import json

import pytest
import torch

from vjepa_fast.config import schema
from vjepa_fast.data.synthetic import render_suite
from vjepa_fast.errors import ConfigError, UserError
from vjepa_fast.trainer import checkpoint, train
from vjepa_fast.trainer.distributed import Distributed
from vjepa_fast.trainer.step import TrainStep

from .conftest import batch, config
from .ranks import launch

RUN = """
import sys
import torch
torch.set_num_threads(1)
from vjepa_fast import config
from vjepa_fast.trainer.trainer import Trainer
trainer = Trainer(config.load(sys.argv[1]))
masks = []
inner = trainer.step.sampler.draw
trainer.step.sampler.draw = lambda clip, **kw: masks.append(inner(clip, **kw)) or masks[-1]
trainer.run()
torch.save({"weights": [p.detach() for p in trainer.step.params], "masks": masks[0].wait()[0][0]}, sys.argv[2])
trainer.close()
"""

# one step over two micro-batches; the first process alone sees an image and has a parameter more that gets a gradient
STEP = """
import sys
import torch
torch.set_num_threads(1)
from tests.trainer.conftest import batch
from vjepa_fast import config
from vjepa_fast.trainer.distributed import Distributed
from vjepa_fast.trainer.step import TrainStep
from tests.trainer import recorder
from tests.trainer.test_distributed import micro_batches
from vjepa_fast.trainer import captured
world = Distributed.from_env("cpu")
step, graphs = TrainStep(config.load(sys.argv[1]), world=world), {}
if step.quantum:
    step.capture(captured.Part(step))
    step.captured.graphs.capture, graphs = recorder.capture, step.captured.graphs.captured
out = step(micro_batches(world.rank), 0, stop=world.rank == 1)
grads = [None if p.grad is None else p.grad.clone() for p in step.params]
for i in range(1, 3 if step.quantum else 2):
    step([step.stage(b, 0) for b in micro_batches(world.rank)], i)
found = {"grads": grads, "stop": out.stop, "graphs": len(graphs), "weights": [p.detach() for p in step.params]}
torch.save(found, sys.argv[2])
world.close()
"""


# three steps; notes how many gradients there are when a bucket of DDP is sent
SENT = """
import json, sys
import torch
import torch.distributed as dist
torch.set_num_threads(1)
from tests.trainer.conftest import batch
from vjepa_fast import config
from vjepa_fast.trainer.distributed import Distributed
from vjepa_fast.trainer.step import TrainStep
world = Distributed.from_env("cpu")
step, made, sent = TrainStep(config.load(sys.argv[1]), world=world), [], []
for p in step.params:
    p.register_post_accumulate_grad_hook(made.append)
def send(_, bucket):
    sent.append(len(made))
    return dist.all_reduce(bucket.buffer().div_(2), async_op=True).get_future().then(lambda x: x.value()[0])
step.gradients.ddp.register_comm_hook(None, send)
for i in range(3):
    made.clear(), sent.clear()
    step([batch(i, size=1, first=2 * i + world.rank, seed=world.rank)], i)
json.dump({"sent": sent, "made": len(made), "static": step.gradients.ddp.static_graph}, open(sys.argv[2], "w"))
world.close()
"""


def micro_batches(rank):
    image = {"frames": (1,), "modality": "image"} if rank == 0 else {}
    return [batch(0, seed=rank, first=3 * rank), batch(1, seed=rank, first=6 + 3 * rank, **image)]


@pytest.fixture
def cfg(tmp_path):
    manifest = render_suite("motion8", tmp_path / "data", splits={"train": 16}, size=32, frames=8, seed=0)["train"]
    one_block = (schema.MaskConfig(num_blocks=1, spatial_scale=(0.4, 0.6)),)  # never truncated
    # SGD-like epsilon: Adam's own blows the rounding of tiny gradients up to whole steps
    return config(
        tmp_path / "one",
        data={"datasets": (manifest,), "batch_size": 2},
        masks={"specs": one_block},
        optimization={"epochs": 1, "ipe": 4, "eps": 1e-3},
        objectives={"pred": {}, "context": {"warmup": [0, 0]}},
    )


def rows(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_two_processes_equal_one_with_twice_the_batch(cfg, tmp_path):
    two, codes, errors, outs = launch(cfg, tmp_path, "two", RUN)
    assert codes == [0, 0], errors
    one = train(dataclasses.replace(cfg, data=dataclasses.replace(cfg.data, batch_size=4)))
    a, b = rows(one.folder), rows(tmp_path / "two")
    assert len(a) == len(b) == 4  # the first process alone writes
    torch.testing.assert_close([r["loss"] for r in b], [r["loss"] for r in a], rtol=2e-5, atol=0)
    torch.testing.assert_close([r["grad_norm"] for r in b], [r["grad_norm"] for r in a], rtol=1e-3, atol=0)
    ranks = [torch.load(path) for path in outs]
    assert all(torch.equal(x, y) for x, y in zip(ranks[0]["weights"], ranks[1]["weights"]))
    assert ranks[0]["masks"].shape == ranks[1]["masks"].shape
    assert not torch.equal(ranks[0]["masks"], ranks[1]["masks"])
    saved = checkpoint.load(tmp_path / "two")["encoder"]
    alone = checkpoint.load(one.checkpoint)["encoder"]
    for key, value in saved.items():
        torch.testing.assert_close(value, alone[key], rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("quantum", [0, 96])  # by DDP, or in place for graphs, which the second and third step use
def test_gradients_are_those_of_the_single_processes_averaged(quantum, tmp_path):
    """With micro-batches, a gradient that one process has and the other has not, and one that neither has."""
    objectives = {"pred": {}, "hamiltonian": {"hidden_dim": 8}}
    cfg = config(objectives=objectives, runtime={"capacity_quantum": quantum}, optimization={"accumulate": 2})
    _, codes, errors, outs = launch(cfg, tmp_path, "step", STEP)
    assert codes == [0, 0], errors
    ranks = [torch.load(path) for path in outs]
    alone = []
    for rank in range(2):
        step = TrainStep(cfg)
        step(micro_batches(rank), 0)
        alone.append([p.grad for p in step.params])
    kinds = {"both": 0, "one": 0, "none": 0}
    for a, b, ours, theirs in zip(*alone, ranks[0]["grads"], ranks[1]["grads"], strict=True):
        kinds[("none", "one", "both")[(a is not None) + (b is not None)]] += 1
        if a is None and b is None:
            assert ours is None and theirs is None  # as in one process, so that the optimiser leaves it alone
            continue
        want = ((0 if a is None else a) + (0 if b is None else b)) / 2
        assert torch.equal(ours, theirs)
        torch.testing.assert_close(ours, want, rtol=1e-5, atol=1e-7)
    assert all(kinds.values()), kinds
    assert [r["graphs"] > 0 for r in ranks] == [quantum > 0] * 2
    assert ranks[0]["stop"] and ranks[1]["stop"]  # asked of the second alone
    assert all(torch.equal(x, y) for x, y in zip(ranks[0]["weights"], ranks[1]["weights"]))


def test_gradients_are_sent_while_others_are_still_computed(tmp_path):
    """DDP's first bucket has 1 MB, and from the third step on it holds what the backward pass computes first."""
    model = {"embed_dim": 192, "num_heads": 3, "pred_embed_dim": 96, "pred_num_heads": 3, "levels": 2}
    _, codes, errors, outs = launch(config(tmp_path / "x", model=model), tmp_path, "sent", SENT)
    assert codes == [0, 0], errors
    found = json.loads(outs[0].read_text())
    assert len(found["sent"]) >= 2 and found["sent"][0] < found["made"] / 2, found
    assert found["static"]  # DDP was told that all steps are alike


def test_an_error_of_one_process_is_raised_in_all(monkeypatch):
    mine, theirs, world = UserError("mine"), UserError("theirs"), Distributed(rank=1, world=2)
    cases = ((None, [None, None], None), (None, [theirs, None], theirs), (mine, [theirs, mine], mine))
    for own, everyone, raised in cases:
        monkeypatch.setattr(world, "gather", lambda _, everyone=everyone: everyone)
        if raised is None:
            world.agree(own)
        else:
            with pytest.raises(UserError) as caught:
                world.agree(own)
            assert caught.value is raised


def test_environment(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    world = Distributed.from_env("cpu")
    assert (world.rank, world.world, world.main) == (0, 1, True)
    assert world.gather(3) == [3] and world.any([False, True]) == [False, True]
    monkeypatch.setenv("WORLD_SIZE", "two")
    with pytest.raises(ConfigError, match="WORLD_SIZE='two'"):
        Distributed.from_env("cpu")
