"""`probe` and `fewshot` on a run folder of `method: levjepa`."""

import json

import pytest
import torch

from vjepa_fast import config, trainer
from vjepa_fast.cli import main
from vjepa_fast.data.synthetic import FewShot, render_suite
from vjepa_fast.evaluation import random_encoder
from vjepa_fast.evaluation.run.encoders import checkpoint_config
from vjepa_fast.models import load_encoder

TINY = (
    "data.crop_size=32",
    "data.patch_size=8",
    "data.dataset_fpcs=[4]",
    "data.batch_size=4",
    "model.embed_dim=24",
    "model.depth=2",
    "model.num_heads=2",
    "levjepa.local_crop=16",
    "levjepa.local_views=2",
    "levjepa.attention=block_causal",
    "optimization.epochs=1",
    "optimization.ipe=2",
)


@pytest.fixture(scope="module")
def suites(tmp_path_factory):
    folder, splits = tmp_path_factory.mktemp("suites"), {"train": 16, "val": 8, "test": 8}
    few = FewShot(motions=("right", "down"))
    return (
        render_suite("motion8", folder / "motion8", splits=splits, size=32, frames=8),
        render_suite(few, folder / "fewshot", splits={"train": 36, "test": 144}, size=32, frames=8)["test"],
    )


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory, suites):
    folder = tmp_path_factory.mktemp("run")
    cfg = config.load("levjepa_small", [*TINY, f"data.datasets=[{suites[0]['train']}]", f"folder={folder}"])
    return trainer.train(cfg).folder


def labels(path):
    rows = json.loads(path.read_text())["rows"]
    assert all(0 <= r["low"] <= r["accuracy"] <= r["high"] <= 1 for r in rows)
    return {r["label"] for r in rows}


def test_probe_and_fewshot_read_a_run(suites, run_folder, tmp_path, capsys):
    motion, novel = suites
    parts = [word for part in ("train", "val", "test") for word in (f"--{part}", motion[part])]
    common = ["--device", "cpu", "--json"]
    assert main(["probe", str(run_folder), *parts, *common, str(tmp_path / "probe.json")]) == 0
    few = ["--novel", novel, "--episodes", "20"]
    assert main(["fewshot", str(run_folder), *few, *common, str(tmp_path / "fewshot.json")]) == 0
    for name in ("probe", "fewshot"):
        assert labels(tmp_path / f"{name}.json") == {"random init", "target_encoder", "encoder"}


def test_the_random_control_is_the_same_encoder_before_training(run_folder):
    trained, control = load_encoder(run_folder), random_encoder(checkpoint_config(run_folder))
    assert control.block_causal and control.cls_token is not None
    clip = torch.randint(0, 256, (2, 3, 4, 32, 32), dtype=torch.uint8)
    assert trained(clip).shape == control(clip).shape == (2, 32, 24)
    assert not torch.equal(trained(clip), control(clip))
