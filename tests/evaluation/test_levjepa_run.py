"""`probe` and `fewshot` on a run folder of `method: levjepa`."""

import json

import numpy as np
import pytest
import torch

from tests.evaluation.cases import tiny_encoder
from vjepa_fast import config, ops, trainer
from vjepa_fast.cli import main
from vjepa_fast.data import load_manifest
from vjepa_fast.data.synthetic import FewShot, render_suite
from vjepa_fast.errors import ConfigError
from vjepa_fast.evaluation import ClipSet, extract_features, random_encoder
from vjepa_fast.evaluation.extract.features import extract_poolings, poolings_of
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


def test_the_class_token_is_a_pooling_from_the_same_pass(run_folder, tmp_path):
    encoder = load_encoder(run_folder)
    clips = torch.randint(0, 256, (5, 3, 4, 32, 32), dtype=torch.uint8)
    source = ClipSet(clips, np.arange(5) % 2, "five", "five")
    mean, std = encoder.clip_settings["mean"], encoder.clip_settings["std"]
    with torch.no_grad():
        wanted = encoder.summary(ops.normalize_clip(clips, mean, std), None)
        both = encoder.with_summary(ops.normalize_clip(clips, mean, std))
    assert torch.equal(both[1], wanted) and both[0].shape == (5, 32, 24)
    assert poolings_of(encoder)[-1] == ("last", "cls")
    keys = [("last", "mean"), ("last", "cls")]
    for _ in range(2):  # taken, then read back
        bank = extract_poolings(encoder, source, keys, batch_size=2, cache_dir=tmp_path)
        np.testing.assert_allclose(bank["last", "cls"].x, wanted, atol=1e-5)
    alone = extract_features(encoder, source, pooling="mean")
    np.testing.assert_allclose(bank["last", "mean"].x, alone.x, atol=1e-5)


def test_a_readout_reads_the_class_token_and_choosing_has_it_among_the_candidates(suites, run_folder, tmp_path):
    motion, novel = suites
    few = ["fewshot", str(run_folder), "--novel", novel, "--episodes", "20", "--device", "cpu", "--json"]
    assert main([*few, str(tmp_path / "few.json"), "--pooling", "cls"]) == 0
    parts = [word for part in ("train", "val", "test") for word in (f"--{part}", motion[part])]
    common = ["probe", str(run_folder), *parts, "--probes", "knn", "--device", "cpu", "--json"]
    assert main([*common, str(tmp_path / "given.json"), "--readout", "last/cls/standard"]) == 0
    assert main([*common, str(tmp_path / "auto.json"), "--readout", "auto"]) == 0
    rows = json.loads((tmp_path / "auto.json").read_text())["rows"]
    assert all(any("/cls/" in c["name"] for c in r["chosen"]["candidates"]) for r in rows)


def test_features_of_videos_by_the_class_token(suites, run_folder):
    encoder, manifest = load_encoder(run_folder), suites[0]["val"]
    bank = extract_features(encoder, load_manifest(manifest), pooling="cls")
    found = encoder.features(manifest, pooling="cls", clips=1, max_bad=0.0)
    np.testing.assert_allclose(found.x, bank.x, atol=1e-5)
    with pytest.raises(ConfigError, match="has no class token"):
        tiny_encoder().features(manifest, pooling="cls")


def test_an_encoder_without_class_token_refuses_that_pooling(run_folder):
    clips = ClipSet(torch.zeros(2, 3, 4, 32, 32, dtype=torch.uint8), np.arange(2), "two", "two")
    with pytest.raises(ConfigError, match="has no class token; choose from mean, time"):
        extract_features(tiny_encoder(), clips, pooling="cls")
    with pytest.raises(ConfigError, match="one class token, of level last"):
        extract_features(load_encoder(run_folder), clips, pooling="cls", level="all")
