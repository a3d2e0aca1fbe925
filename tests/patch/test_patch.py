"""Parts of this package in a training module of FAIR's kind."""

from __future__ import annotations

import importlib.util
import logging
import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from vjepa_fast import ops
from vjepa_fast.errors import UserError
from vjepa_fast.patch import vjepa2

SAMPLES = [([torch.zeros(3)], 0, [list(range(n))]) for n in (4, 8, 4, 4)]
SIZES = dict(dataset_fpcs=[4, 8], crop_size=(32, 32), patch_size=(8, 8))


@pytest.fixture
def module():
    """The script anew, without anything patched."""
    spec = importlib.util.spec_from_file_location("fair_style", Path(__file__).with_name("fair_style.py"))
    found = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(found)
    return found


@pytest.mark.parametrize(("loss_exp", "resume"), [(1.0, 0), (2.0, 3)])
def test_a_run_stays_the_same(module, caplog, loss_exp, resume):
    wanted, state = module.main(5, loss_exp, resume), torch.get_rng_state()
    with caplog.at_level(logging.INFO, "vjepa_fast"):
        said = vjepa2(module)
    assert (
        [line.split()[0] for line in said]
        == ["MaskCollator", "apply_masks", "loss_fn"]
        == [record.getMessage().split()[1] for record in caplog.records]
    )
    got = module.main(5, loss_exp, resume)
    assert got == pytest.approx(wanted, rel=1e-5) and len(set(got)) == 5
    assert torch.equal(torch.get_rng_state(), state)  # as many random numbers were drawn


def test_same_masks_from_the_same_numbers(module):
    original = module.MaskCollator
    vjepa2(module)
    mine, its = module.MaskCollator(module.CFGS, **SIZES), original(module.CFGS, **SIZES)
    redrawn = 0
    for seed in range(40):
        both = []
        for collator in (mine, its):
            torch.manual_seed(seed)
            both.append((collator(SAMPLES), torch.get_rng_state()))
        (got, one), (wanted, other) = both
        blocks = sum(mask["num_blocks"] for mask in module.CFGS) * 3 * len(SAMPLES)
        torch.manual_seed(seed)
        torch.randint(0, 9, (blocks,))
        redrawn += not torch.equal(torch.get_rng_state(), one)
        assert torch.equal(one, other) and len(got) == len(wanted) == 2
        for (_, *a), (_, *b) in zip(got, wanted):
            for x, y in zip(a, b):
                assert all(map(torch.equal, x, y)) and all(m.dtype == torch.int64 for m in x)
    assert redrawn  # some samples had no context and were drawn again


def test_goes_to_the_workers_of_a_loader(module):
    vjepa2(module)
    torch.manual_seed(0)
    loader = torch.utils.data.DataLoader(
        SAMPLES * 4, batch_size=4, num_workers=2, collate_fn=module.MaskCollator(module.CFGS, **SIZES)
    )
    assert [len(groups) for groups in loader] == [2] * 4


SPAWNED = """
import multiprocessing, torch
import fair_style
from vjepa_fast.patch import vjepa2

if __name__ == "__main__":
    multiprocessing.set_start_method("spawn")  # as the published main does
    original = fair_style.MaskCollator
    vjepa2(fair_style)
    samples = [([torch.zeros(3)], 0, [list(range(n))]) for n in (4, 8, 4, 4)] * 3
    found = []
    for which in (original, fair_style.MaskCollator):
        setattr(fair_style, "MaskCollator", which)  # where the other process will look for it
        collator = which(fair_style.CFGS, dataset_fpcs=[4, 8], crop_size=32, patch_size=8)
        collator.step()
        torch.manual_seed(0)
        loader = torch.utils.data.DataLoader(samples, batch_size=4, num_workers=1, collate_fn=collator)
        found.append([[m.tolist() for _, *masks in groups for many in masks for m in many] for groups in loader])
    assert found[0] == found[1] and len(found[0]) == 3, found
    assert collator._draws[4][0]._count.value == 3
    print("the same masks")
"""


def test_goes_to_workers_that_are_spawned(tmp_path):
    (tmp_path / "spawned.py").write_text(SPAWNED)
    paths = (str(Path(__file__).parent), str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH", ""))
    env = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths))}
    done = subprocess.run(
        [sys.executable, "spawned.py"], cwd=tmp_path, env=env, capture_output=True, text=True, timeout=300
    )
    assert done.stdout.strip() == "the same masks", done.stderr


def test_a_worker_that_patches_as_well(module, monkeypatch):
    monkeypatch.setitem(sys.modules, "fair_style", module)
    original = module.MaskCollator
    vjepa2(module)
    again, given = module.MaskCollator(module.CFGS, **SIZES).__reduce__()
    assert isinstance(again(*given).reference, original)


@pytest.mark.parametrize("name", ["MaskCollator", "apply_masks", "loss_fn"])
def test_a_difference_is_an_error_at_the_first_batch(module, name):
    class Off(module.MaskGenerator):
        def block_size(self, seed):
            return super().block_size(seed + 1)

    if name == "MaskCollator":
        module.MaskGenerator, words = Off, "draws other masks"
    else:
        honest, words = getattr(module, name), "computes something else"

        def apply_masks(x, masks, concat=True):
            found = honest(x, masks, concat)
            return [part.flip(-1) for part in found]

        def loss_fn(z, h, masks_pred, loss_exp=1.0):
            return honest(z, h, masks_pred, loss_exp) * 1.01

        setattr(module, name, {"apply_masks": apply_masks, "loss_fn": loss_fn}[name])
    vjepa2(module)
    if name == "apply_masks":  # the loss asks it too
        del module.loss_fn
        module.loss_fn = lambda *args: None
    with pytest.raises(UserError, match=f"fair_style.{name}: vjepa_fast {words}|{name}: {words}"):
        module.main(1)


def test_what_cannot_be_patched(module):
    unknown = [dict(module.CFGS[0], motion=True)]
    module.MaskGenerator = lambda *args, **kwargs: None
    del module.apply_masks
    said = vjepa2(module, loss="no_such")
    assert said[1:] == [
        "apply_masks: not an attribute of the module, so it stays",
        "no_such: neither an attribute of the module nor defined inside its functions, so it stays",
    ]
    with pytest.raises(UserError, match="MaskCollator was patched already; call vjepa2 once"):
        vjepa2(module)
    with pytest.raises(UserError, match="MaskCollator: masks have a key 'motion'"):
        module.MaskCollator(unknown, **SIZES)
    with pytest.raises(UserError, match="pickle: has none of MaskCollator, apply_masks, loss_fn"):
        vjepa2(pickle)


def test_blocks_that_cover_everything(module):
    vjepa2(module)
    covering = dict(module.CFGS[0], spatial_scale=(1.0, 1.0), temporal_scale=(1.0, 1.0), aspect_ratio=(1.0, 1.0))
    with pytest.raises(UserError, match="no context is left after 1000 tries"):
        module.MaskCollator([covering], **SIZES)(SAMPLES)


def test_a_loss_of_another_kind(module):
    module.loss_fn = lambda z, h: 0
    with pytest.raises(UserError, match="expected a function of .z, h, masks_pred, loss_exp.; use ops.latent_loss"):
        vjepa2(module)
    assert not hasattr(module.MaskCollator, "vjepa_fast_original")  # all or nothing


@pytest.mark.parametrize("p", [1.0, 1.5, 2.0])
def test_latent_loss(p):
    generator = torch.Generator().manual_seed(0)
    z, h = torch.randn(2, 5, 8, generator=generator), torch.randn(2, 9, 8, generator=generator)
    idx = torch.stack([torch.randperm(9, generator=generator)[:5] for _ in range(2)])
    mine, its = z.clone().requires_grad_(), z.clone().requires_grad_()
    rows = h.gather(1, idx[..., None].expand(-1, -1, 8))
    got, wanted = ops.latent_loss(mine, h, idx, loss_exp=p), ((its - rows).abs() ** p).mean() / p
    got.backward(), wanted.backward()
    assert torch.allclose(got, wanted) and torch.allclose(mine.grad, its.grad, atol=1e-7)
    normal = torch.nn.functional.layer_norm(h.unflatten(-1, (2, 4)), (4,)).flatten(-2)
    raw = ops.latent_loss(z, h, idx, loss_exp=p, levels=2, normalize=True)
    assert torch.allclose(raw, ops.latent_loss(z, normal, idx, loss_exp=p), atol=1e-4)
    with pytest.raises(ValueError, match="latent_loss: loss_exp"):
        ops.latent_loss(z, h, idx, loss_exp=0.5)
