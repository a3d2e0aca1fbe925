import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.evaluation.cases import SMALL, error_of, small_run
from vjepa_fast import config, models
from vjepa_fast.cli import main
from vjepa_fast.cli.probe import notes
from vjepa_fast.data.synthetic import render_suite
from vjepa_fast.errors import DataError
from vjepa_fast.evaluation import random_encoder
from vjepa_fast.evaluation.extract import clips, shards
from vjepa_fast.evaluation.probes import PROBES, Probe, result_of
from vjepa_fast.evaluation.probes.published import SETTINGS
from vjepa_fast.evaluation.run import encoders, probe, sources
from vjepa_fast.evaluation.run.encoders import cache_folder, checkpoint_config
from vjepa_fast.evaluation.run.probe import ProbeProtocol, probe_checkpoint
from vjepa_fast.evaluation.tasks import TASKS, Task


@pytest.fixture(scope="module")
def suites(tmp_path_factory):
    folder = tmp_path_factory.mktemp("suites")
    motion = render_suite("motion8", folder / "motion8", splits={"train": 32, "val": 16, "test": 24}, size=32, frames=8)
    novel = render_suite("fewshot", folder / "fewshot", splits={"test": 288}, size=32, frames=8)
    return motion, novel["test"]


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory):
    return small_run(tmp_path_factory.mktemp("run"))


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


def test_each_probe_chooses_its_readout_on_validation(suites, run_folder, tmp_path, capsys):
    motion, out, found = suites[0], tmp_path / "probe.json", {}
    lines = Path(motion["test"]).read_text().split("\n")
    labels = [line.split()[1] for line in lines if line]
    other = Path(motion["test"]).with_name("other.csv")
    other.write_text("\n".join(f"{line.split()[0]} {y}" for line, y in zip(lines, labels[::-1])))
    for test, val in ((motion["test"], True), (str(other), True), (motion["test"], False)):
        command = ["probe", str(run_folder), "--train", motion["train"], "--test", test, "--device", "cpu"]
        command += ["--val", motion["val"], "--no-random"] if val else []
        assert main([*command, "--which", "encoder", "--readout", "auto", "--json", str(out)]) == 0
        text = capsys.readouterr().out
        rows = json.loads(out.read_text())["rows"]
        found[test, val] = {(r["label"], r["probe"]): r["chosen"] for r in rows}
    assert found[motion["test"], True] == found[str(other), True] != found[motion["test"], False]
    for (label, name), chosen in found[motion["test"], False].items():
        count = 10 if name == "linear" else 30  # the linear probe standardises by itself
        best = chosen["candidates"][0]
        assert len(chosen["candidates"]) == count and best["name"] == chosen["readout"]
        line = (
            f"{label}, {name}: readout {best['name']} (chosen from {count}, {100 * best['accuracy']:.1f} on validation)"
        )
        assert line in text
    given = ["probe", str(run_folder), "--train", motion["train"], "--test", motion["test"], "--device", "cpu"]
    rows = []
    for flags in (["--readout", "all/mean/none"], ["--pooling", "mean", "--level", "all"]):
        assert main([*given, *flags, "--json", str(out)]) == 0
        rows.append([(r["hits"], r["difference"]) for r in json.loads(out.read_text())["rows"]])
    assert rows[0] == rows[1]


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--readout", "last/tdiff/standard/cosine"], "a probe's is level/pooling/transform"),
        (["--readout", "auto", "--level", "all"], "--level is part of a readout"),
        (["--readout", "auto", "--protocol", "published"], "leave --readout out"),
        (["--readout", "auto", "--fewshot", "NOVEL"], "vjepa-fast fewshot --readout"),
    ],
)
def test_readouts_that_a_probe_does_not_have(suites, run_folder, capsys, more, message):
    motion, novel = suites
    command = ["probe", str(run_folder), "--train", motion["train"], "--test", motion["test"], "--device", "cpu"]
    assert main([*command, *(novel if m == "NOVEL" else m for m in more)]) == 2
    assert message in error_of(capsys)


def test_novel_clips_that_pretraining_saw_are_stated(suites, run_folder, monkeypatch, capsys):
    cfg, novel = checkpoint_config(run_folder), suites[1]
    seen = dataclasses.replace(cfg, data=dataclasses.replace(cfg.data, datasets=(novel,), datasets_weights=None))
    monkeypatch.setattr(encoders, "checkpoint_config", lambda path: seen)
    monkeypatch.setattr(probe, "probe_checkpoint", lambda *a, **k: [])
    assert main(["probe", str(run_folder), "--fewshot", novel, "--device", "cpu"]) == 0
    text = capsys.readouterr().out
    assert "288 samples (100.0 %) are the same file" in text


def test_random_init_is_the_start_of_the_run(run_folder):
    cfg = checkpoint_config(run_folder)
    torch.manual_seed(cfg.seed)
    start, _ = models.build_from_config(cfg)
    state = random_encoder(cfg).state_dict()
    assert all(torch.equal(v, state[k]) for k, v in start.state_dict().items())


def test_memory_or_disk_gives_the_same_rows(suites, run_folder, monkeypatch):
    motion, _ = suites
    parts = {k: motion[k] for k in ("train", "val", "test")}
    one = probe_checkpoint(run_folder, **parts, protocol=ProbeProtocol(batch_size=5))
    monkeypatch.setattr(clips, "IN_MEMORY", 0)
    two = probe_checkpoint(run_folder, **parts, protocol=ProbeProtocol(batch_size=7))
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
        ({"--probes": "linear,lineer"}, "unknown probe 'lineer'; accepted: attentive, knn, linear, published"),
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
    assert message in error_of(capsys)


def test_cache_folder_of_a_run_and_of_a_file(tmp_path):
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    assert cache_folder(tmp_path / "run") == tmp_path / "run" / "features"
    assert cache_folder(tmp_path / "run" / "checkpoints" / "step-1.pt") == tmp_path / "run" / "features"
    assert cache_folder(tmp_path / "fair.pt") == tmp_path / "features"


@pytest.mark.parametrize(("one", "other"), [("val", "test"), ("train", "test"), ("train", "val")])
def test_parts_that_share_files_are_refused(suites, run_folder, tmp_path, capsys, one, other):
    motion, _ = suites
    mixed = tmp_path / f"{other}.csv"  # a part with one clip of another
    lines = {p: [line.rsplit(maxsplit=1) for line in Path(motion[p]).read_text().splitlines()] for p in (one, other)}
    root = str(Path(motion[one]).parent)
    mixed.write_text("".join(f"{root}/{p} {y}\n" for p, y in (*lines[other], lines[one][0])))
    parts = {**motion, other: str(mixed)}
    command = ["probe", str(run_folder), *(v for p in ("train", "val", "test") for v in (f"--{p}", parts[p]))]
    assert main([*command, "--no-cache"]) == 2
    assert f"1 files are in the {one} part as well" in " ".join(capsys.readouterr().err.split())


# ---------------------------------------------------------------- probes, tasks and the published protocol


def probing(suites, run_folder, *more):
    parts = [w for p in ("train", "val", "test") for w in (f"--{p}", suites[0][p])]
    return ["probe", str(run_folder), "--which", "target_encoder", *parts, "--device", "cpu", *more]


def test_command_with_all_probes_and_a_task(suites, run_folder, tmp_path, capsys):
    out = tmp_path / "probe.json"
    more = ["--probe", "all", "--task", "motion8", "--clips", "2", "--crops", "2", "--epochs", "1", "--json", str(out)]
    assert main(probing(suites, run_folder, *more, "--cache", str(tmp_path / "features"))) == 0
    found = json.loads(out.read_text())
    rows = {(r["label"], r["probe"]): r for r in found["rows"]}
    assert set(rows) == {(e, p) for e in ("random init", "target_encoder") for p in ("linear", "knn", "attentive")}
    r = rows["target_encoder", "attentive"]
    assert r["n"] == 24 and len(r["hits"]) == 24 and r["difference"] is not None
    assert r["chosen"]["max_over_heads_on_test"] >= r["accuracy"] and r["chosen"]["heads"] == 20
    text = " ".join(capsys.readouterr().out.split())
    shown = f"max over 20 heads on the test set {100 * r['chosen']['max_over_heads_on_test']:.1f}"
    assert f"target_encoder, motion8, attentive: {shown} (the published way of scoring" in text
    assert found["protocol"]["clips"] == 2 and found["protocol"]["short"] == "hold"
    folders = [p for p in (tmp_path / "features").iterdir() if p.is_dir()]
    assert len(folders) == 6 and all("-tokens-" in p.name for p in folders)  # two encoders, three parts


def test_a_probe_and_a_task_that_others_register(suites, run_folder, tmp_path, monkeypatch):
    class First(Probe):
        needs = "tokens"

        def __call__(self, train, val, test, options):
            assert (train.views, options.task.title, options.epochs) == ((2, 1), "mine", 3)
            return result_of(np.full(len(test), train.y[0]), test.y, {"label": int(train.y[0])})

    monkeypatch.setitem(PROBES._entries, "first", First)
    monkeypatch.setitem(TASKS._entries, "mine", Task("mine", "mine", 8, clips=2, epochs=3))
    out = tmp_path / "probe.json"
    more = ["--probes", "first, knn", "--task", "mine", "--no-cache", "--json", str(out)]
    assert main(probing(suites, run_folder, *more)) == 0
    rows = json.loads(out.read_text())["rows"]
    assert [r["probe"] for r in rows] == ["first", "knn"] * 2 and rows[0]["accuracy"] == 0.125


def test_command_with_the_published_protocol(suites, run_folder, tmp_path, monkeypatch, capsys):
    pooled, every = [], []
    features, tokens = sources.extract_features, probe.extract_tokens
    monkeypatch.setattr(sources, "extract_features", lambda *a, **kw: pooled.append(kw) or features(*a, **kw))
    monkeypatch.setattr(probe, "extract_tokens", lambda *a, **kw: every.append(kw) or tokens(*a, **kw))
    monkeypatch.setattr(clips, "IN_MEMORY", 0)
    out = tmp_path / "probe.json"
    more = ["--protocol", "published", "--num-frames", "4", "--epochs", "2", "--no-cache", "--json", str(out)]
    assert main(probing(suites, run_folder, *more)) == 0
    rows = json.loads(out.read_text())["rows"]
    assert [r["probe"] for r in rows] == ["published", "published"] and rows[1]["difference"] is not None
    shared = {"level": "last", "spread": "whole", "short": "hold", "num_frames": 4, "clips": 1, "crops": 1}
    assert not pooled and len(every) == 4
    assert all(k.items() >= {**shared, "geometry": "short_side", "storage": "float16"}.items() for k in every)
    assert (
        "nothing chosen" in capsys.readouterr().out and "no settings are published" in rows[0]["chosen"]["assumed"][-1]
    )
    assert notes([]) == []

    monkeypatch.setitem(SETTINGS, "motion8", dataclasses.replace(SETTINGS["motion8"], tokens="mean"))
    every.clear()
    alone = ["probe", str(run_folder), "--train", suites[0]["train"], "--task", "motion8", "--device", "cpu", *more]
    assert main(alone) == 0  # one list: its last fifth is the test part
    rows = json.loads(out.read_text())["rows"]
    count = len(Path(suites[0]["train"]).read_text().splitlines())
    assert {r["n"] for r in rows} == {count - int(0.8 * count)} and rows[0]["chosen"]["batch"] == 32
    assert not every and {(k["pooling"], k["geometry"], k["dtype"]) for k in pooled} == {
        ("mean", "native", torch.float32)
    }


def test_tokens_that_do_not_fit_the_disk_are_refused_before_any_is_taken(
    suites, run_folder, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(shards, "free_bytes", lambda folder: 1000)
    taken = []
    monkeypatch.setattr(probe, "extract_tokens", lambda *a, **kw: taken.append(a))
    more = ["--protocol", "published", "--cache", str(tmp_path)]
    assert main(probing(suites, run_folder, *more)) == 2
    assert "all tokens take" in capsys.readouterr().err and not taken
    for flags in (["--row", "mixed_4gpu_hw"], ["--every-clip"]):
        assert main(probing(suites, run_folder, *flags)) == 2
        assert "belong to --protocol published" in capsys.readouterr().err


def test_command_refuses_labels_that_do_not_fit(suites, run_folder, tmp_path, capsys):
    assert main(probing(suites, run_folder, "--task", "order")) == 2
    assert "has 12 classes, found 8" in capsys.readouterr().err
    assert main(probing(suites, run_folder, "--task", "nothing")) == 2
    assert "task: unknown evaluation task 'nothing'; accepted: diving48" in capsys.readouterr().err
    gap = tmp_path / "gap.csv"
    lines = [line.rsplit(maxsplit=1) for line in Path(suites[0]["train"]).read_text().splitlines()]
    root = suites[0]["train"].rsplit("/", 1)[0]
    gap.write_text("".join(f"{root}/{p} {label}\n" for p, label in lines if label != "3"))
    with pytest.raises(DataError, match="gap.csv: no sample of label 3"):
        probe_checkpoint(run_folder, train=str(gap), test=suites[0]["test"])
    few = tmp_path / "few.csv"
    few.write_text("".join(f"{root}/{p} {label}\n" for p, label in lines if int(label) < 4))
    with pytest.raises(DataError, match="test.csv: label .* is none of the training part, which has 0 to 3"):
        probe_checkpoint(run_folder, train=str(few), test=suites[0]["test"])
