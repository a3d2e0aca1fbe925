import dataclasses
import json
from pathlib import Path

import pytest
import torch

from vjepa_fast import config, models
from vjepa_fast.cli import main
from vjepa_fast.data.synthetic import render_suite
from vjepa_fast.evaluation import random_encoder
from vjepa_fast.evaluation.run.checkpoint import Protocol, cache_folder, checkpoint_config, probe_checkpoint

SMALL = [
    "data.crop_size=32",
    "data.patch_size=16",
    "data.dataset_fpcs=[4]",
    "data.frame_sample_rate=2",
    "model.embed_dim=24",
    "model.depth=4",
    "model.num_heads=2",
]


@pytest.fixture(scope="module")
def suites(tmp_path_factory):
    folder = tmp_path_factory.mktemp("suites")
    motion = render_suite("motion8", folder / "motion8", splits={"train": 32, "val": 16, "test": 24}, size=32, frames=8)
    novel = render_suite("fewshot", folder / "fewshot", splits={"test": 96}, size=32, frames=8)
    return motion, novel["test"]


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory):
    """A run folder whose target and student differ, with weights unlike the seed's."""
    cfg = config.load("demo_baseline_single", SMALL)
    folder = tmp_path_factory.mktemp("run")
    (folder / "checkpoints").mkdir()
    states = {}
    for i, name in enumerate(("encoder", "target_encoder")):
        states[name] = models.to_fair(random_encoder(cfg, seed=100 + i).state_dict())
    torch.save({**states, "config": config.to_dict(cfg), "step": 3}, folder / "checkpoints" / "step-00000003.pt")
    return folder


def arguments(suites, run_folder, *more):
    motion, novel = suites
    base = ["probe", str(run_folder), "--train", motion["train"], "--val", motion["val"], "--test", motion["test"]]
    return [*base, "--fewshot", novel, "--queries", "2", "--shots", "1", "--episodes", "20", "--device", "cpu", *more]


def test_probe_prints_and_writes_every_encoder_beside_random_init(suites, run_folder, tmp_path, capsys):
    out = tmp_path / "probe.json"
    assert main(arguments(suites, run_folder, "--json", str(out))) == 0
    text = capsys.readouterr().out
    found = json.loads(out.read_text())
    rows = {(r["label"], r["suite"], r["probe"]): r for r in found["rows"]}
    assert set(rows) == {
        (label, suite, probe)
        for label in ("random init", "target_encoder", "encoder")
        for suite, probe in (("motion8", "linear"), ("motion8", "knn"), ("fewshot few-shot", "1-shot"))
    }
    for (label, suite, _), r in rows.items():
        assert label in text and suite in text and r["low"] <= r["accuracy"] <= r["high"]
        assert (r["difference"] is None) == (label == "random init")
        assert r["n"] == (24 if suite == "motion8" else 20)
    statement = found["leakage"]["statement"]
    assert statement in text and "not checked" in statement  # this run names no data set
    assert rows["encoder", "motion8", "linear"]["hits"] != rows["target_encoder", "motion8", "linear"]["hits"]
    assert len(list((run_folder / "features").glob("*.safetensors"))) == 3 * 4  # encoders by parts
    before = {p: p.stat().st_mtime_ns for p in (run_folder / "features").iterdir()}
    assert main(arguments(suites, run_folder)) == 0  # from the cache
    assert before == {p: p.stat().st_mtime_ns for p in (run_folder / "features").iterdir()}


def test_novel_clips_that_pretraining_saw_are_stated(suites, run_folder, monkeypatch, capsys):
    from vjepa_fast.evaluation.run import checkpoint as run

    cfg, novel = checkpoint_config(run_folder), suites[1]
    seen = dataclasses.replace(cfg, data=dataclasses.replace(cfg.data, datasets=(novel,), datasets_weights=None))
    monkeypatch.setattr(run, "checkpoint_config", lambda path: seen)
    monkeypatch.setattr(run, "probe_checkpoint", lambda *a, **k: [])
    assert main(["probe", str(run_folder), "--fewshot", novel, "--device", "cpu"]) == 0
    text = capsys.readouterr().out
    assert "96 samples (100.0 %) are the same file" in text


def test_random_init_is_the_start_of_the_run(run_folder):
    cfg = checkpoint_config(run_folder)
    torch.manual_seed(cfg.seed)
    start, _ = models.build_from_config(cfg)
    state = random_encoder(cfg).state_dict()
    assert all(torch.equal(v, state[k]) for k, v in start.state_dict().items())


def test_memory_or_disk_gives_the_same_rows(suites, run_folder, monkeypatch):
    from vjepa_fast.evaluation.run import checkpoint as module

    motion, _ = suites
    parts = {k: motion[k] for k in ("train", "val", "test")}
    one = probe_checkpoint(run_folder, **parts, protocol=Protocol(batch_size=5))
    monkeypatch.setattr(module, "IN_MEMORY", 0)
    two = probe_checkpoint(run_folder, **parts, protocol=Protocol(batch_size=7))
    assert [r.hits for r in one] == [r.hits for r in two]


def test_no_random_and_one_encoder(suites, run_folder):
    motion, _ = suites
    rows = probe_checkpoint(run_folder, train=motion["train"], test=motion["test"], which=("encoder",), random=False)
    assert {r.label for r in rows} == {"encoder"} and all(r.difference is None for r in rows)


def test_weights_without_configuration_need_one(suites, run_folder, tmp_path, capsys):
    content = torch.load(run_folder / "checkpoints" / "step-00000003.pt", weights_only=True)
    del content["config"]
    file = tmp_path / "fair.pt"
    torch.save(content, file)
    motion, _ = suites
    command = ["probe", str(file), "--train", motion["train"], "--test", motion["test"], "--no-cache"]
    assert main(command) == 2
    assert "give --config or --no-random" in capsys.readouterr().err
    recipe = tmp_path / "small.yaml"
    recipe.write_text(config.dump_yaml(config.load("demo_baseline_single", SMALL)))
    assert main([*command, "--config", str(recipe), "--probe", "knn"]) == 0
    other = tmp_path / "other.yaml"
    other.write_text(config.dump_yaml(config.load("demo_baseline_single", [*SMALL, "model.embed_dim=48"])))
    assert main([*command, "--config", str(other)]) == 2
    assert "another architecture" in capsys.readouterr().err
    assert not (tmp_path / "features").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"--train": "missing.csv"}, "missing.csv: no such manifest"),
        ({"--train": None}, "--train and --test go together"),
        ({"checkpoint": "nowhere"}, "nowhere"),
        ({"checkpoint": "EMPTY"}, "no checkpoints"),
        ({"--json": "no/such/folder/x.json"}, "cannot be written"),
        ({"--queries": "90"}, "lower the number of queries"),
        ({"--pooling": "max"}, "invalid choice"),
        ({"--device": "cuda:77"}, "cuda:77"),
        ({"--batch-size": "0"}, "not a positive number"),
        ({"--test": "EMPTY.csv"}, "empty"),
    ],
)
def test_bad_input_is_one_line_and_exit_2(suites, run_folder, tmp_path, capsys, change, message):
    (tmp_path / "EMPTY").mkdir()
    (tmp_path / "EMPTY.csv").write_text("")
    command = arguments(suites, run_folder, "--no-cache")
    for key, value in change.items():
        value = str(tmp_path / value) if value and value.startswith("EMPTY") else value
        if key == "checkpoint":
            command[1] = value
        elif value is None:
            at = command.index(key)
            del command[at : at + 2]
        elif key in command:
            command[command.index(key) + 1] = value
        else:
            command += [key, value]
    assert main(command) == 2
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error:")]
    assert len(errors) == 1 and message in errors[0]


def test_cache_folder_of_a_run_and_of_a_file(tmp_path):
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    assert cache_folder(tmp_path / "run") == tmp_path / "run" / "features"
    assert cache_folder(tmp_path / "run" / "checkpoints" / "step-1.pt") == tmp_path / "run" / "features"
    assert cache_folder(tmp_path / "fair.pt") == tmp_path / "features"


@pytest.mark.parametrize(("one", "other"), [("val", "test"), ("train", "test"), ("train", "val")])
def test_parts_that_share_files_are_refused(suites, run_folder, tmp_path, capsys, one, other):
    motion, _ = suites
    mixed = tmp_path / f"{other}.csv"  # a part with one clip of another
    lines = {p: [line.rsplit(maxsplit=1) for line in open(motion[p])] for p in (one, other)}
    root = str(Path(motion[one]).parent)
    mixed.write_text("".join(f"{root}/{p} {y}\n" for p, y in (*lines[other], lines[one][0])))
    parts = {**motion, other: str(mixed)}
    command = ["probe", str(run_folder), *(v for p in ("train", "val", "test") for v in (f"--{p}", parts[p]))]
    assert main([*command, "--no-cache"]) == 2
    assert f"1 files are in the {one} part as well" in " ".join(capsys.readouterr().err.split())
