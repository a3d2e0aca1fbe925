"""The commands ``synthetic`` and ``data``, in this process, and their exit codes."""

import shutil

import pytest

from vjepa_fast.cli import main
from vjepa_fast.data import load_manifest


def test_synthetic_one_and_all(tmp_path, capsys):
    options = ["--train", "2", "--val", "1", "--test", "1", "--size", "32", "--frames", "4", "--workers", "1"]
    assert main(["synthetic", "motion8", str(tmp_path / "one"), *options, "--seed", "5"]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert f"motion8 train: 2 clips, manifest {tmp_path / 'one' / 'train.csv'}" in said
    assert main(["synthetic", "all", str(tmp_path / "every"), *options]) == 0
    assert sorted(p.name for p in (tmp_path / "every").iterdir()) == [
        "dive",
        "fewmotion",
        "fewshot",
        "motion8",
        "objects",
        "order",
    ]
    assert all(len(load_manifest(tmp_path / "every" / s / "test.csv")) == 1 for s in ("dive", "objects"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["synthetic", "motion9", "x"], "motion9"),
        (["synthetic", "motion8", "OUT", "--size", "31"], "must be even"),
        (["data", "manifest", "OUT/none"], "no such folder"),
        (["data", "check", "OUT/none.csv"], "no such manifest"),
        (["data", "check", "OUT"], "is a folder"),
    ],
)
def test_errors_are_one_line_and_exit_2(tmp_path, capsys, arguments, message):
    assert main([a.replace("OUT", str(tmp_path)) for a in arguments]) == 2
    error = capsys.readouterr().err.strip()
    assert error.startswith("error: ") and message in error and "\n" not in error


def test_manifest_then_check(tmp_path, tiny_suites, broken, capsys):
    for name, path in zip(("a", "b"), load_manifest(tiny_suites["motion8"]["train"]).paths):
        (tmp_path / "films" / name).mkdir(parents=True)
        shutil.copy(path, tmp_path / "films" / name)
    assert main(["data", "manifest", str(tmp_path / "films")]) == 0
    assert "train: 2 samples of 2 classes" in capsys.readouterr().out
    manifest = str(tmp_path / "films" / "train.csv")
    assert main(["data", "check", manifest, "--speed", "0"]) == 0
    assert "2 video samples of 2 classes, 0 unreadable" in capsys.readouterr().out
    assert (
        main(["data", "check", manifest, "--frames", "16", "--frame-step", "2", "--speed", "0"]) == 2
    )  # 31 frames are needed
    assert "has 16 frames" in capsys.readouterr().out
    shutil.copy(broken["cut"], tmp_path / "films" / "a" / "z.mp4")
    main(["data", "manifest", str(tmp_path / "films")])
    assert main(["data", "check", manifest, "--speed", "0"]) == 2
    out = capsys.readouterr()
    assert "bad: " in out.out and "z.mp4" in out.out and out.err.startswith("error: ") and "1 of 3" in out.err
