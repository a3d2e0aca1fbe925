"""The loops in docs/examples make the steps of our own trainer."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest
import torch

from vjepa_fast import config, models
from vjepa_fast.trainer import train

FOLDER = Path(__file__).parents[2] / "docs" / "examples"
STEPS = 4
CHANGES = [
    "data.crop_size=32",
    "data.patch_size=8",
    "data.dataset_fpcs=[4]",
    "data.frame_sample_rate=2",
    "data.batch_size=3",
    "data.fps=null",
    "model.embed_dim=24",
    "model.depth=4",
    "model.num_heads=2",
    "model.levels=4",
    "model.predict_all=true",
    "objectives.context.coeff=0.5",
    "objectives.ld.hidden_dim=8",
    "optimization.epochs=1",
    f"optimization.ipe={STEPS}",
    "optimization.clip_grad=0.1",
    "runtime.dtype=float32",
    "runtime.device=cpu",
    "runtime.log_every=1",
]


def example(name):
    """A script of docs/examples as a module."""
    spec = importlib.util.spec_from_file_location(f"example_{name}", FOLDER / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    path = list(sys.path)
    try:
        spec.loader.exec_module(module)
    finally:
        sys.path[:] = path
        sys.modules.pop("jepa", None)
    return module


@pytest.fixture(scope="module")
def ours(tmp_path_factory, tiny_suites):
    """(recipe of the run, its folder, its losses) of our own trainer."""
    folder = tmp_path_factory.mktemp("ours")
    datasets = json.dumps([tiny_suites["motion8"]["train"]])
    overrides = [*CHANGES, f"data.datasets={datasets}"]
    cfg, losses = config.load("own_videos", [*overrides, f"folder={folder}/run"]), []
    train(cfg, on_log=lambda row: losses.append(row["loss"]))
    return overrides, folder / "run", losses


def same_encoder(found, run):
    wanted = models.load_encoder(run)
    for (name, a), b in zip(wanted.state_dict().items(), found.state_dict().values(), strict=True):
        assert torch.allclose(a, b, atol=1e-4), name
    moved = models.load_encoder(run, which="encoder").state_dict()["blocks.0.attn.qkv.weight"]
    assert not torch.equal(moved, wanted.state_dict()["blocks.0.attn.qkv.weight"])


def test_accelerate(ours, tmp_path):
    pytest.importorskip("accelerate")
    overrides, run, wanted = ours
    cfg = config.load("own_videos", [*overrides, f"folder={tmp_path}/run"])
    losses = example("accelerate_train").train(cfg, cpu=True)
    assert losses == pytest.approx(wanted, rel=1e-4) and len(losses) == STEPS and losses[-1] != losses[0]
    same_encoder(models.load_encoder(tmp_path / "run" / "target_encoder.pt", config=cfg), run)


def test_lightning(ours, tmp_path):
    pytest.importorskip("lightning")
    overrides, run, wanted = ours
    cfg = config.load("own_videos", [*overrides, f"folder={tmp_path}/run"])
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    module = example("lightning_train").train(cfg, accelerator="cpu", devices=1, **quiet)
    assert module.losses == pytest.approx(wanted, rel=1e-4) and len(module.losses) == STEPS
    same_encoder(models.load_encoder(tmp_path / "run" / "lightning.ckpt", config=cfg), run)
