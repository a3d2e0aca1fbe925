import json

import numpy as np
import pytest
import torch

from vjepa_fast import config, models
from vjepa_fast.cli import main
from vjepa_fast.cli.probe import notes
from vjepa_fast.data.synthetic import render_suite
from vjepa_fast.errors import DataError, UserError
from vjepa_fast.evaluation import AttentiveHeads, Features, get_task, published_probe, random_encoder
from vjepa_fast.evaluation.probes.published import published_settings
from vjepa_fast.evaluation.run import checkpoint as module
from vjepa_fast.evaluation.run.checkpoint import Protocol, probe_checkpoint

SMALL = ["data.crop_size=32", "data.patch_size=16", "data.dataset_fpcs=[4]", "data.frame_sample_rate=2",
         "model.embed_dim=24", "model.depth=4", "model.num_heads=2"]  # fmt: skip


def planted(n, seed, shuffle=False):
    rng = np.random.default_rng(seed)
    y = np.arange(n) % 4
    x = rng.standard_normal((n, 8)).astype(np.float32)
    x[np.arange(n), y] += 6
    return Features(x, rng.permutation(y) if shuffle else y)


def test_settings_are_those_of_the_result_files():
    found = {name: published_settings(get_task(name)) for name in ("ssv2", "diving48", "imagenet100", "ucf101")}
    assert [p.epochs for p in found.values()] == [100, 100, 50, 100]
    assert [p.head for p in found.values()] == ["attention", "linear", "linear", "linear"]
    assert {(p.lr, p.weight_decay, p.pooling, p.level, p.spread) for p in found.values()} == {
        (1e-3, 0.01, "mean", "last", "whole")
    }
    p = Protocol(name="published", task="ssv2", level="all", pooling="time", probes=("linear",)).settled()
    assert (p.level, p.pooling, p.probes, p.epochs, p.num_frames, p.spread) == (
        "last", "mean", ("published",), 100, 16, "whole"
    )  # fmt: skip
    assert Protocol(name="published", epochs=7).settled().epochs == 7
    with pytest.raises(UserError, match="unknown protocol"):
        Protocol(name="other").settled()


@pytest.mark.parametrize("task", ["ssv2", "diving48"])
def test_the_probe_sees_one_token_and_reads_a_planted_signal(task, monkeypatch):
    shapes, forward = set(), AttentiveHeads.forward
    monkeypatch.setattr(AttentiveHeads, "forward", lambda self, x: shapes.add(x.shape[1:]) or forward(self, x))
    settings = published_settings(get_task(task))
    r = published_probe(planted(200, 1), planted(200, 2), settings, epochs=40, batch_size=20)
    assert shapes == {(1, 8)} and r.accuracy > 0.95
    assert r.chosen["tokens"] == 1 and r.chosen["selection"] == "none" and r.chosen["head"] == settings.head
    r = published_probe(planted(400, 3, shuffle=True), planted(400, 4, shuffle=True), settings, epochs=4)
    assert r.ci95[0] <= 0.25 <= r.ci95[1]


def test_published_errors():
    good = planted(40, 1)
    with pytest.raises(DataError, match="no sample of label 1"):
        published_probe(Features(good.x, good.y * 2), good)
    with pytest.raises(DataError, match="at least one sample"):
        published_probe(good, Features(np.zeros((0, 8)), []))
    x = good.x.copy()
    x[0, 0] = np.nan
    with pytest.raises(DataError, match="not finite"):
        published_probe(good, Features(x, good.y))


@pytest.fixture(scope="module")
def suite(tmp_path_factory):
    folder = tmp_path_factory.mktemp("suite") / "motion8"
    return render_suite("motion8", folder, splits={"train": 24, "val": 8, "test": 16}, size=32, frames=8)


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory):
    cfg = config.load("demo_baseline_single", SMALL)
    folder = tmp_path_factory.mktemp("run")
    (folder / "checkpoints").mkdir()
    states = {"target_encoder": models.to_fair(random_encoder(cfg, seed=100).state_dict())}
    torch.save({**states, "config": config.to_dict(cfg), "step": 3}, folder / "checkpoints" / "step-00000003.pt")
    return folder


def command(suite, run_folder, *more):
    parts = [w for p in ("train", "val", "test") for w in (f"--{p}", suite[p])]
    return ["probe", str(run_folder), "--which", "target_encoder", *parts, "--device", "cpu", *more]


def test_command_with_all_probes_and_a_task(suite, run_folder, tmp_path, capsys):
    out = tmp_path / "probe.json"
    more = ["--probe", "all", "--task", "motion8", "--clips", "2", "--crops", "2", "--epochs", "1", "--json", str(out)]
    assert main(command(suite, run_folder, *more)) == 0
    found = json.loads(out.read_text())
    rows = {(r["label"], r["probe"]): r for r in found["rows"]}
    assert set(rows) == {(e, p) for e in ("random init", "target_encoder") for p in ("linear", "knn", "attentive")}
    r = rows["target_encoder", "attentive"]
    assert r["n"] == 16 and len(r["hits"]) == 16 and r["difference"] is not None
    assert r["chosen"]["max_over_heads_on_test"] >= r["accuracy"] and r["chosen"]["heads"] == 20
    text = " ".join(capsys.readouterr().out.split())
    shown = f"max over 20 heads on the test set {100 * r['chosen']['max_over_heads_on_test']:.1f}"
    assert f"target_encoder, motion8, attentive: {shown} (the published way of scoring" in text
    assert found["protocol"]["clips"] == 2 and found["protocol"]["short"] == "hold"
    folders = [p for p in (run_folder / "features").iterdir() if p.is_dir()]
    assert len(folders) == 6 and all("-tokens-" in p.name for p in folders)  # two encoders, three parts


def test_command_with_the_published_protocol(suite, run_folder, tmp_path, monkeypatch, capsys):
    asked = []
    extract = module.extract_features
    monkeypatch.setattr(module, "extract_features", lambda *a, **kw: asked.append(kw) or extract(*a, **kw))
    monkeypatch.setattr(module, "IN_MEMORY", 0)
    out = tmp_path / "probe.json"
    more = ["--protocol", "published", "--num-frames", "4", "--epochs", "2", "--no-cache", "--json", str(out)]
    assert main(command(suite, run_folder, *more)) == 0
    rows = json.loads(out.read_text())["rows"]
    assert [r["probe"] for r in rows] == ["published", "published"] and rows[1]["difference"] is not None
    assert {(k["pooling"], k["level"], k["spread"], k["num_frames"]) for k in asked} == {("mean", "last", "whole", 4)}
    assert "nothing chosen" in capsys.readouterr().out
    assert notes([]) == []


def test_command_refuses_labels_that_do_not_fit(suite, run_folder, tmp_path, capsys):
    assert main(command(suite, run_folder, "--task", "dive")) == 2
    assert "synthetic dives, ordered triples has 12 classes, found 8" in capsys.readouterr().err
    assert main(command(suite, run_folder, "--task", "nothing")) == 2
    assert "unknown task 'nothing'" in capsys.readouterr().err
    gap = tmp_path / "gap.csv"
    lines = [line.rsplit(maxsplit=1) for line in open(suite["train"])]
    root = suite["train"].rsplit("/", 1)[0]
    gap.write_text("".join(f"{root}/{p} {label}\n" for p, label in lines if label != "3"))
    with pytest.raises(DataError, match="gap.csv: no sample of label 3"):
        probe_checkpoint(run_folder, train=str(gap), test=suite["test"])
    few = tmp_path / "few.csv"
    few.write_text("".join(f"{root}/{p} {label}\n" for p, label in lines if int(label) < 4))
    with pytest.raises(DataError, match="test.csv: label .* is none of the training part, which has 0 to 3"):
        probe_checkpoint(run_folder, train=str(few), test=suite["test"])
