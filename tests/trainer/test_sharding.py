"""``runtime.parallel: fsdp``: two processes that share the weights against two that have them all, and against one."""

import dataclasses
import json
import shutil

import pytest
import torch

from vjepa_fast.errors import ConfigError
from vjepa_fast.trainer import checkpoint, sharding

from .conftest import config
from .ranks import launch_all, small

# runs to the step in the third argument, and says what it holds
RUN = """
import json, sys
import torch
torch.set_num_threads(1)
from vjepa_fast import config
from vjepa_fast.models.parts import is_cut, local

from vjepa_fast.trainer.trainer import Trainer
cfg = config.load(sys.argv[1])
trainer = Trainer(cfg)
trainer.run(END)
step, held = trainer.step, {}
for name in ("encoder", "predictor", "target_encoder"):
    own = list(getattr(step, name).parameters())
    held[name] = [all(is_cut(p) for p in own), sum(local(p).numel() for p in own), sum(p.numel() for p in own)]
moments = [x for s in step.optimizer.state.values() for x in s.values() if x.numel() > 1]
own, together = sum(local(p).numel() for p in moments), sum(p.numel() for p in moments)
held["moments"] = [all(is_cut(p) for p in moments), own, together]
held["notes"] = trainer.notes
json.dump(held, open(sys.argv[2], "w"))
trainer.close()
"""


def script(end):
    return RUN.replace("END", str(end))


@pytest.fixture
def cfg(tmp_path):
    # an epsilon as of SGD: Adam's own blows the rounding of tiny gradients up to whole steps
    return small(
        tmp_path,
        data={"batch_size": 1},
        optimization={"epochs": 2, "ipe": 2, "global_batch": 4, "eps": 1e-3, "clip_grad": 0.5},
        runtime={"save_every": 2},
    )


def fsdp(cfg, **model):
    return of(cfg, runtime={"parallel": "fsdp"}, model=model)


def of(cfg, **sections):
    for name, values in sections.items():
        cfg = dataclasses.replace(cfg, **{name: dataclasses.replace(getattr(cfg, name), **values)})
    return cfg


def losses(folder):
    return [json.loads(line)["loss"] for line in (folder / "metrics.jsonl").read_text().splitlines()]


def run(tmp_path, end, *runs):
    """Make these runs up to step ``end``; returns what the first process of each holds."""
    found = launch_all(runs, tmp_path, script(end))
    for (_, name, world), (_, codes, errors, _) in zip(runs, found):
        assert codes == [0] * world, (name, errors)
    return [json.loads(outs[0].read_text()) for *_, outs in found]


def same_weights(a, b):
    for part in ("encoder", "predictor", "target_encoder", "heads"):
        assert list(a[part]) == list(b[part])
        for key, value in a[part].items():
            torch.testing.assert_close(b[part][key], value, rtol=1e-5, atol=1e-6)
    for n, moments in a["opt"]["state"].items():
        for key, value in moments.items():
            torch.testing.assert_close(b["opt"]["state"][n][key], value, rtol=1e-4, atol=1e-7)


def test_shared_weights_train_as_whole_ones(cfg, tmp_path):
    recomputed = fsdp(cfg, use_activation_checkpointing=True)
    runs = [(cfg, "one", 1), (cfg, "ddp", 2), (fsdp(cfg), "fsdp", 2), (recomputed, "again", 2)]
    _, whole, held, _ = run(tmp_path, 4, *runs)
    for part in ("encoder", "predictor", "target_encoder", "moments"):
        all_cut, own, together = held[part]
        assert own < 0.6 * together  # the halves of what divides; the small rest is padded
        assert all_cut or part == "moments"  # those of the heads are whole
        assert not whole[part][0] and whole[part][1] == together
    alone = losses(tmp_path / "one")
    first = checkpoint.load(tmp_path / "one")
    for name in ("ddp", "fsdp", "again"):
        torch.testing.assert_close(losses(tmp_path / name), alone, rtol=1e-6, atol=0)
        same_weights(first, checkpoint.load(tmp_path / name))


def test_a_checkpoint_goes_on_with_and_without_sharing(cfg, tmp_path):
    """Two steps one way, two the other: the losses of four steps of one process."""
    run(tmp_path, 4, (cfg, "straight", 1))
    run(tmp_path, 2, (fsdp(cfg), "down", 2), (cfg, "up", 1))
    shutil.copytree(tmp_path / "down", tmp_path / "wider")
    run(tmp_path, 4, (cfg, "down", 1), (fsdp(cfg), "up", 2), (fsdp(cfg), "wider", 4))
    alone, end = losses(tmp_path / "straight"), checkpoint.load(tmp_path / "straight")
    for name in ("down", "up", "wider"):
        torch.testing.assert_close(losses(tmp_path / name), alone, rtol=1e-6, atol=0)
        same_weights(end, checkpoint.load(tmp_path / name))


REFUSED = {
    "optimization.name: muon": {"optimization": {"name": "muon"}},
    "target.mode: online": {"target": {"mode": "online"}},
    "data.dataset_fpcs": {"data": {"dataset_fpcs": (4, 8)}},
    "runtime.dtype: float16": {"runtime": {"dtype": "float16"}},
    "runtime.fp8": {"runtime": {"fp8": True}},
    "runtime.cuda_graphs": {"runtime": {"cuda_graphs": True}},
    "runtime.compile": {"runtime": {"compile": "blocks"}},
    "runtime.epilogues": {"runtime": {"epilogues": "torch"}},
}


@pytest.mark.parametrize("reason", REFUSED)
def test_what_does_not_combine_is_refused_with_the_reason(reason):
    cfg = fsdp(config(**REFUSED[reason]))
    with pytest.raises(ConfigError, match=f"runtime.parallel: fsdp is not supported here: {reason}") as error:
        sharding.check(cfg)
    assert "\n" not in str(error.value)
    sharding.check(of(cfg, runtime={"parallel": "ddp"}))


def test_all_reasons_are_in_one_line():
    cfg = fsdp(config(optimization={"name": "muon"}, target={"mode": "online"}, method="levjepa"))
    with pytest.raises(ConfigError) as error:
        sharding.check(cfg)
    assert all(part in str(error.value) for part in ("method: levjepa", "muon", "target.mode"))


def test_images_by_process_are_refused():
    images = dataclasses.replace(config().data, rank_ratio=0.5)
    with pytest.raises(ConfigError, match="img_data.rank_ratio"):
        sharding.check(dataclasses.replace(fsdp(config()), img_data=images))
