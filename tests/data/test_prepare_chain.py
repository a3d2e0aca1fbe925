"""Data sets in their official forms through `prepare`, `train`, and `probe` or `fewshot`; each a tiny one."""

import json

import pytest

from tests.data.trees import Trees
from tests.docs.test_commands import TINY
from vjepa_fast import cli

STEPS = ("optimization.ipe=2", "optimization.epochs=1")
SETS = [word for pair in (*TINY.split(), *STEPS) for word in ("--set", pair)]
VIEW = [
    "--num-frames",
    "4",
    "--crop-size",
    "32",
    "--frame-step",
    "1",
    "--device",
    "cpu",
    "--no-random",
    "--no-cache",
    "--which",
    "target_encoder",
]
EPISODES = ["--way", "2", "--shots", "1", "--queries", "1", "--episodes", "4", "--no-content"]

# data set -> more words for prepare, training part, part that is measured on, key of the copies' rate
CASES = {
    "ucf101": (["--split", "1", "--convert", "--fps", "5", "--short-side", "32"], "train1", "test1"),
    "hmdb51": (["--convert", "rows"], "train1", "test1"),
    "ssv2": ([], "train", "val"),
    "diving48": (["--convert", "raw", "--frame-step", "2"], "train", "test"),
    "imagenet100": (["--lists", "imagenet100/classes.txt"], "train", "val"),
    "kinetics400": ([], "train", "val"),
}


@pytest.fixture(scope="module")
def trees(tmp_path_factory):
    return Trees(tmp_path_factory.mktemp("trees"))


def command(*words):
    assert cli.main([*map(str, words)]) == 0


def train(manifest):
    command("train", "ucf101_4gpu_baseline", "--set", f"data.datasets=[{manifest}]", *SETS, "--folder", "runs/it")


@pytest.mark.parametrize("name", CASES)
def test_from_the_download_to_a_figure(name, trees, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    getattr(trees, name)(tmp_path / name)
    more, first, second = CASES[name]
    command("prepare", name, name, "--out", "lists", "--workers", 1, *more)
    train(f"lists/{first}.csv")
    if name in ("ucf101", "imagenet100", "kinetics400"):
        command("probe", "runs/it", "--train", f"lists/{first}.csv", "--test", f"lists/{second}.csv", *VIEW,
                "--json", "rows.json")  # fmt: skip
    else:
        command("fewshot", "runs/it", "--novel", f"lists/{second}.csv", "--pretrain", f"lists/{first}.csv", *VIEW,
                *EPISODES, "--json", "rows.json")  # fmt: skip
    rows = json.loads((tmp_path / "rows.json").read_text())
    assert rows


def test_from_fewshot_lists_to_episodes(trees, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "lists").mkdir()
    for part, classes in (("train", ("kick", "run")), ("val", ("sit",)), ("test", ("climb", "fencing"))):
        lines = [f"{name}/{name}_{i}" for name in classes for i in range(3)]
        (tmp_path / "lists" / f"{part}list03.txt").write_text("\n".join(lines) + "\n")
        for line in lines:
            trees.film(tmp_path / "videos" / f"{line}.avi")
    command("prepare", "fewshot", "videos", "--lists", "lists", "--out", "out", "--workers", 1)
    train("out/base.csv")
    command("fewshot", "runs/it", "--base", "out/base.csv", "--novel", "out/novel.csv", *VIEW, *EPISODES)
