import json
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.evaluation.cases import SMALL, error_of, small_run
from vjepa_fast import config
from vjepa_fast.cli import main
from vjepa_fast.data import load_manifest
from vjepa_fast.data.synthetic import FewShot, render_suite
from vjepa_fast.evaluation import Features, against, fewshot_rows, random_encoder
from vjepa_fast.evaluation.extract.features import extract_features
from vjepa_fast.evaluation.fewshot import episode_protocol
from vjepa_fast.evaluation.run.fewshot import fewshot_checkpoint


@pytest.fixture(scope="module")
def suites(tmp_path_factory):
    folder = tmp_path_factory.mktemp("suites")
    splits = {"train": 36, "test": 144}
    few = FewShot(motions=("right", "down"))  # 36 base classes, 24 novel ones
    return render_suite(few, folder / "fewshot", splits=splits, size=32, frames=8)


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory, suites):
    """A run folder, trained on the novel classes."""
    overrides = [f"data.datasets=[{suites['test']},gone.csv]", "data.datasets_weights=null"]
    return small_run(tmp_path_factory.mktemp("run"), *overrides)


def arguments(suites, run_folder, *more):
    return ["fewshot", str(run_folder), "--novel", suites["test"], "--episodes", "40", "--device", "cpu", *more]


def test_rows_stand_beside_random_init_and_leakage_is_stated(suites, run_folder, tmp_path, capsys):
    out = tmp_path / "fewshot.json"
    assert main(arguments(suites, run_folder, "--json", str(out))) == 0
    text = capsys.readouterr().out
    found = json.loads(out.read_text())
    rows = {(r["label"], r["probe"]): r for r in found["rows"]}
    assert set(rows) == {(e, p) for e in ("random init", "target_encoder", "encoder") for p in ("1-shot", "5-shot")}
    for (label, probe), r in rows.items():
        assert label in text and probe in text and r["low"] <= r["accuracy"] <= r["high"]
        assert r["n"] == 40 and r["chance"] == 0.2 and (r["difference"] is None) == (label == "random init")
        assert r["chosen"] == {
            "protocol": "action",
            "way": 5,
            "queries": 1,
            "classifier": "prototype",
            "metric": "cosine",
            "center": "none",
            "l2": False,
        }
    assert "5-way, 1 query per class, 40 episodes, 95 % interval 1.96 std / sqrt(n)" in text
    assert "144 samples (100.0 %) are the same file of fewshot/test.csv" in text  # the checkpoint's own data set
    assert "not checked: the checkpoint names gone.csv" in text
    assert [o["kind"] for o in found["leakage"]["overlaps"]] == ["path", "class"]
    before = {p: p.stat().st_mtime_ns for p in (run_folder / "features").iterdir()}
    assert main(arguments(suites, run_folder, "--classifier", "logistic", "--l2", "--center", "shots")) == 0
    assert "logistic (C = 1), less the mean of the shots, L2-normalised" in capsys.readouterr().out
    assert before == {p: p.stat().st_mtime_ns for p in (run_folder / "features").iterdir()}  # features once


def test_rows_are_those_of_the_features(suites, run_folder):
    protocol = episode_protocol("meta_baseline", shots=(2,), queries=4, episodes=40, seed=3)
    novel, base = load_manifest(suites["test"]), load_manifest(suites["train"])
    options = {"center": "base", "l2": True, "metric": "euclidean"}
    rows = fewshot_checkpoint(run_folder, novel, base=base, protocol=protocol, options=options, which=("encoder",))
    assert [r.label for r in rows] == ["random init", "encoder"]
    cfg = config.from_dict(torch.load(run_folder / "checkpoints" / "step-00000003.pt", weights_only=True)["config"])
    by_hand = []
    for seed, kind in ((None, "random"), (100, "pretrained")):
        encoder = random_encoder(cfg, seed)
        f, b = (extract_features(encoder, m) for m in (novel, base))
        x = f.x - b.x.mean(0)
        x /= np.linalg.norm(x, axis=1, keepdims=True)
        by_hand += fewshot_rows(kind, kind, "fewshot few-shot", Features(x, f.y), protocol, metric="euclidean")
    assert [r.accuracy for r in rows] == pytest.approx([r.accuracy for r in by_hand], abs=0.01)  # ties may fall apart
    assert rows[1].difference["value"] == pytest.approx(against(by_hand, by_hand[:1])[1].difference["value"], abs=0.02)
    assert rows[0].high - rows[0].low == pytest.approx(by_hand[0].high - by_hand[0].low, rel=0.2)


def test_pretraining_manifests_given(suites, run_folder, capsys):
    assert main(arguments(suites, run_folder, "--pretrain", suites["train"], "--which", "encoder", "--shots", "1")) == 0
    text = capsys.readouterr().out
    assert "against fewshot/train.csv: no shared file, source video or class name found" in text
    assert "target_encoder" not in text and "5-shot" not in text


def test_without_configuration_leakage_is_not_checked(suites, run_folder, tmp_path, capsys):
    content = torch.load(run_folder / "checkpoints" / "step-00000003.pt", weights_only=True)
    recipe = tmp_path / "small.yaml"
    recipe.write_text(
        config.dump_yaml(
            config.load("demo_baseline_single", [*SMALL, "data.datasets=[]", "data.datasets_weights=null"])
        )
    )
    del content["config"]
    torch.save(content, tmp_path / "fair.pt")
    command = ["fewshot", str(tmp_path / "fair.pt"), "--novel", suites["test"], "--no-cache", "--episodes", "8"]
    assert main([*command, "--config", str(recipe)]) == 0
    assert "no pretraining manifests given: leakage not checked" in capsys.readouterr().out
    assert main(command) == 2
    assert "give --config or --no-random" in capsys.readouterr().err


def test_a_list_and_a_split(suites, run_folder, tmp_path, capsys):
    novel = load_manifest(suites["test"])
    lines = [f"test{y}/{p.rsplit('/', 1)[1].rsplit('.', 1)[0]}" for p, y in zip(novel.paths, novel.labels)]
    (tmp_path / "list.txt").write_text("\n".join(lines))
    command = arguments(suites, run_folder, "--no-random", "--shots", "1")
    command[command.index("--novel") + 1] = str(tmp_path / "list.txt")
    assert main([*command, "--videos", str(Path(novel.paths[0]).parent)]) == 0
    assert "1-shot" in capsys.readouterr().out
    assert main(arguments(suites, run_folder, "--split", "ucf101")) == 2
    assert "classes of ucf101 test are missing" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--novel", "missing.csv"], "missing.csv: no such manifest"),
        (["--pretrain", "missing.csv"], "missing.csv: no such manifest"),
        (["--way", "25"], "25-way episodes need 25 classes, but there are 24"),
        (["--shots", "1", "6"], "7 samples per class (6 shots + 1 queries)"),
        (["--protocol", "sun"], "20 samples per class (5 shots + 15 queries)"),
        (["--protocol", "meta_baseline", "--queries", "1", "--episodes", "42"], "cannot be averaged in groups of 4"),
        (["--episodes", "0"], "episodes: 0 is not a positive number"),
        (["--center"], "give --base"),
        (["--center", "--base", "NOVEL"], "144 files are in the base part as well"),
        (["--C", "2"], "--C belongs to --classifier logistic"),
        (["--classifier", "logistic", "--C", "-1"], "not a positive number"),
        (["--classifier", "logistic", "--metric", "cosine"], "--metric belongs to --classifier prototype"),
        (["--split", "k400"], "unknown few-shot split"),
        (["--json", "no/such/x.json"], "cannot be written"),
        (["--novel", "EMPTY.csv"], "the manifest is empty"),
        (["--videos", ".", "--split", "ucf101"], "leave --split out"),
    ],
)
def test_bad_input_is_one_line_and_exit_2(suites, run_folder, tmp_path, capsys, more, message):
    (tmp_path / "EMPTY.csv").write_text("")
    more = [str(tmp_path / m) if m.startswith("EMPTY") else suites["test"] if m == "NOVEL" else m for m in more]
    assert main(arguments(suites, run_folder, *more)) == 2
    assert message in error_of(capsys)


@pytest.fixture(scope="module")
def base_classes(suites, tmp_path_factory):
    """Manifests of 8 base and 4 validation classes, three clips each, labelled at will."""
    train = load_manifest(suites["train"])
    folder = tmp_path_factory.mktemp("base")
    lines = [f"{p} {i // 3}" for i, p in enumerate(train.paths)]
    (folder / "base.csv").write_text("\n".join(lines[:24]))
    (folder / "val.csv").write_text("\n".join(f"{line.split()[0]} {int(line.split()[1]) - 8}" for line in lines[24:]))
    return str(folder / "base.csv"), str(folder / "val.csv")


# ---------------------------------------------------------------- readouts


def test_a_readout_is_chosen_for_each_encoder_and_never_by_novel_labels(
    suites, run_folder, base_classes, tmp_path, capsys
):
    base, val = base_classes
    novel = load_manifest(suites["test"])
    order = np.random.default_rng(0).permutation(len(novel))
    (tmp_path / "shuffled.csv").write_text("\n".join(f"{p} {novel.labels[i]}" for p, i in zip(novel.paths, order)))
    found = []
    for i, path in enumerate((suites["test"], str(tmp_path / "shuffled.csv"))):
        out = tmp_path / f"{i}.json"
        command = ["--base", base, "--val", val, "--readout", "auto", "--json", str(out)]
        assert main(arguments({"test": path}, run_folder, *command)) == 0
        text = capsys.readouterr().out
        found.append(json.loads(out.read_text()))
    assert found[0]["readout"] == found[1]["readout"] and found[0]["rows"] != found[1]["rows"]
    assert found[0]["leakage_of_base"]["labelled"] and "classifier" not in found[0]
    assert set(found[0]["readout"]) == {"random init", "target_encoder", "encoder"}
    for label, choice in found[0]["readout"].items():
        name, scores = choice["readout"]["name"], [c["score"] for c in choice["candidates"]]
        assert f"{label}: readout {name}, chosen from {len(scores)} on 4-way episodes of the validation classes" in text
        assert choice["candidates"][0]["name"] == name and scores == sorted(scores, reverse=True)
        assert choice["validation"] == {"way": 4, "shots": [1], "queries": 2, "episodes": 300, "seed": 0}
        rows = [r for r in found[0]["rows"] if r["label"] == label]
        assert [r["chosen"]["name"] for r in rows] == [name] * 2
        assert all((r["difference"] is None) == (label == "random init") for r in rows)


def test_a_readout_by_name_is_that_of_the_flags(suites, run_folder, base_classes, tmp_path, capsys):
    out, rows = tmp_path / "x.json", []
    one = ["--base", base_classes[0], "--readout", "last/meanstd/centre+l2/cosine"]
    two = ["--base", base_classes[0], "--pooling", "meanstd", "--center", "--l2"]
    for flags in (one, two):
        assert main(arguments(suites, run_folder, *flags, "--json", str(out))) == 0
        rows.append(json.loads(out.read_text())["rows"])
    assert "random init: readout last/meanstd/centre+l2/cosine (given)" in capsys.readouterr().out
    assert [r["accuracy"] for r in rows[0]] == pytest.approx([r["accuracy"] for r in rows[1]], abs=0.01)  # ties
    assert main(arguments(suites, run_folder, "--readout", "all/tdiff/none/logistic=1", "--no-random")) == 0


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--readout", "auto"], "give --base and --val, or name a readout"),
        (["--readout", "auto", "--base", "BASE"], "give --val, or name a readout"),
        (["--readout", "auto", "--base", "BASE", "--val", "BASE"], "files are in the base part as well"),
        (["--readout", "auto", "--base", "BASE", "--val", "NOVEL"], "files are in the val part as well"),
        (["--readout", "last/tdiff/standard/cosine"], "it is fitted on base clips; give --base"),
        (["--readout", "last/tdif/none/cosine"], "did you mean tdiff"),
        (["--readout", "auto", "--pooling", "mean"], "--pooling is part of a readout"),
        (["--readout", "auto", "--l2"], "--l2 is part of a readout"),
        (["--readout", "auto", "--metric", "cosine"], "--metric: a readout names its classifier"),
        (["--readout", "last/mean/none/cosine", "--val", "VAL"], "--val chooses a readout"),
        (["--readout", "auto", "--base", "BASE", "--method", "meta-baseline"], "--readout belongs to --method frozen"),
    ],
)
def test_bad_input_of_readouts(suites, run_folder, base_classes, capsys, more, message):
    files = {"NOVEL": suites["test"], "BASE": base_classes[0], "VAL": base_classes[1]}
    assert main(arguments(suites, run_folder, *(files.get(m, m) for m in more))) == 2
    assert message in error_of(capsys)


# ---------------------------------------------------------------- methods that train

QUICK = [
    "--which",
    "encoder",
    "--shots",
    "1",
    "--tune-epochs",
    "2",
    "--tune-lr",
    "0.01",
    "--tune-batch",
    "24",
    "--meta-epochs",
    "1",
    "--meta-steps",
    "2",
    "--meta-queries",
    "2",
    "--val-queries",
    "1",
    "--val-way",
    "2",
]


@pytest.mark.parametrize(
    ("method", "stages", "more"),
    [
        ("meta-baseline", ("classifier", "meta"), ["--trunk", "head", "--meta-way", "3"]),
        (
            "sun",
            ("teacher", "student", "meta"),
            ["--trunk", "1", "--meta-way", "3", "--background", "1", "--top-k", "2"],
        ),
    ],
)
def test_tuned_rows_stand_beside_the_frozen_ones(
    suites, run_folder, base_classes, tmp_path, capsys, method, stages, more
):
    base, val = base_classes
    out = tmp_path / "tuned.json"
    command = ["--method", method, "--base", base, "--val", val, *QUICK, *more, "--json", str(out)]
    if method == "sun":
        command[command.index("--meta-queries") + 1] = "1"
    assert main(arguments(suites, run_folder, "--protocol", "meta_baseline", "--queries", "1", *command)) == 0
    text, found = capsys.readouterr().out, json.loads(out.read_text())
    rows = {(r["label"], r["probe"]): r for r in found["rows"]}
    probes = ["1-shot", *(f"{method} {stage} 1-shot" for stage in stages)]
    assert list(rows) == [(label, p) for label in ("random init", "encoder") for p in probes]
    for (label, probe), r in rows.items():
        assert probe in text and (r["difference"] is None) == (label == "random init")
        start = found["tuning"][label]["test"]["start"]["1"]
        if probe == "1-shot":  # tuning starts from the frozen row: same features, same episodes, same interval
            assert (r["accuracy"], r["high"] - r["accuracy"]) == pytest.approx((start["mean"], start["ci95"]))
    assert found["method"] == method and found["leakage_of_base"]["labelled"]
    assert found["tuning"]["encoder"]["settings"]["meta"]["way"] == 3
    assert "95 % interval Student's t over 10 means of 4 episodes" in text
    assert "Leakage of fewshot/test.csv" in text and "against base" in text
    assert "share class numbers" in text  # three manifests that each count from 0


def test_leakage_into_base_classes_is_stated(suites, run_folder, base_classes, tmp_path, capsys):
    base, val = base_classes
    clip = load_manifest(suites["test"]).paths[0]
    copy = tmp_path / Path(clip).name
    copy.write_bytes(Path(clip).read_bytes())
    (tmp_path / "copies.csv").write_text(Path(base).read_text() + f"\n{copy} 0")
    command = ["--method", "meta-baseline", "--base", str(tmp_path / "copies.csv"), "--val", val, *QUICK]
    command += ["--trunk", "head", "--meta-way", "3", "--no-random", "--meta-queries", "1"]
    assert main(arguments(suites, run_folder, *command)) == 0
    text = capsys.readouterr().out
    assert "found; their labels are read, so these are not novel to the encoder" in text
    assert "have the content of another file" in text


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--method", "sun"], "give --base, or --split"),
        (["--method", "meta-baseline", "--base", "NOVEL"], "files are in the base part as well"),
        (["--method", "meta-baseline", "--base", "BASE", "--val", "NOVEL"], "files are in the val part as well"),
        (["--method", "meta-baseline", "--base", "BASE", "--val", "no.csv"], "no.csv: no such manifest"),
        (["--method", "meta-baseline", "--base", "BASE", "--val", "VAL"], "base part base: episodes need 16 samples"),
        (["--method", "meta-baseline", "--base", "BASE", "--meta-way", "9"], "9-way episodes need 9 classes"),
        (
            ["--method", "meta-baseline", "--base", "BASE", "--meta-queries", "1"],
            "base less 5 classes set aside for validation: 5-way episodes need 5 classes, but there are 3",
        ),
        (["--method", "meta-baseline", "--base", "BASE", "--flip", "0"], "--flip belongs to --method sun"),
        (["--method", "sun", "--base", "BASE", "--flip", "2"], "flip 2.0"),
        (["--method", "sun", "--base", "BASE", "--pooling", "meanstd"], "accepted: mean, time"),
        (["--method", "sun", "--base", "BASE", "--l2"], "tested by cosine prototypes"),
        (["--method", "sun", "--base", "BASE", "--images", "single"], "--images single belongs to --method frozen"),
        (["--method", "sun", "--base", "BASE", "--trunk", "tail"], "accepted: all, head"),
        (["--tune-lr", "1"], "--tune-lr belongs to --method meta-baseline or sun"),
        (["--val", "VAL"], "--val belongs to --method meta-baseline or sun"),
    ],
)
def test_bad_input_of_methods_that_train(suites, run_folder, base_classes, capsys, more, message):
    files = {"NOVEL": suites["test"], "BASE": base_classes[0], "VAL": base_classes[1]}
    assert main(arguments(suites, run_folder, *(files.get(m, m) for m in more))) == 2
    assert message in error_of(capsys)
