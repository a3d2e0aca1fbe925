"""``--root`` of the commands that read manifests: where their paths start, and what they do not lead out of."""

import io
import json
import os
import sys

import pytest
import torch

from tests.evaluation.cases import error_of, small_run, tiny_encoder
from vjepa_fast import cli
from vjepa_fast.data import load_manifest
from vjepa_fast.errors import DataError

VIEW = ["--num-frames", "4", "--crop-size", "32", "--frame-step", "1", "--device", "cpu"]
EPISODES = ["--way", "2", "--shots", "1", "--queries", "1", "--episodes", "4"]
COMMANDS = {
    "probe": ["probe", "RUN", "--train", "CSV", "--test", "CSV", "--probe", "knn"],
    "probe of episodes": ["probe", "RUN", "--fewshot", "CSV", *EPISODES],
    "fewshot": ["fewshot", "RUN", "--novel", "CSV"],
    "fewshot, base": ["fewshot", "RUN", "--novel", "GOOD", "--base", "CSV", "--center"],
    "geometry": ["geometry", "RUN", "--data", "CSV", "--views", "0"],
    "features": ["features", "CSV", "--encoder", "RUN", "--out", "OUT"],
    "data check": ["data", "check", "CSV", "--frames", "4"],
}


@pytest.fixture
def files(tmp_path, tiny_suites):
    """(run folder, folder of the videos, list of names in it, list with one that leads out)."""
    whole = load_manifest(tiny_suites["motion8"]["test"])
    folder = os.path.commonpath(whole.paths)
    lines = [f"{os.path.relpath(path, folder)} {label % 2}\n" for path, label in zip(whole.paths, whole.labels)]
    (tmp_path / "lists").mkdir()
    good, bad = tmp_path / "lists" / "good.csv", tmp_path / "lists" / "bad.csv"
    good.write_text("".join(lines))
    bad.write_text("".join([*lines, "../../secret.mp4 0\n"]))
    (tmp_path / "run").mkdir()
    return small_run(tmp_path / "run"), folder, good, bad


def argv(name, files, csv, tmp_path):
    words = {"RUN": files[0], "CSV": csv, "GOOD": files[2], "OUT": tmp_path / "f.safetensors"}
    how = [] if name == "data check" else VIEW
    return [str(words.get(word, word)) for word in COMMANDS[name]] + how + ["--root", files[1]]


@pytest.mark.parametrize("name", COMMANDS)
def test_what_leads_out_is_refused_and_named(name, files, tmp_path, capsys):
    assert cli.main(argv(name, files, files[3], tmp_path)) == 2
    said = capsys.readouterr().err.strip().split("\n")[-1]
    assert said.startswith(f"error: {files[3]}: ") and "secret.mp4 lies outside of --root" in said, said
    assert "data.root_confine" not in said  # which is no option of a command


@pytest.mark.parametrize("name", ["probe of episodes", "geometry", "features", "data check"])
def test_names_start_from_it(name, files, tmp_path, capsys):
    assert cli.main(argv(name, files, files[2], tmp_path)) == 0, capsys.readouterr()


@pytest.mark.parametrize("what", ["video", "folder"])
def test_features_of_what_lies_outside_are_refused(what, files, tmp_path, tiny_suites, capsys):
    video = load_manifest(tiny_suites["motion8"]["train"]).paths[0]
    argv = ["features", video if what == "video" else os.path.dirname(video), "--encoder", str(files[0])]
    assert cli.main([*argv, "--out", str(tmp_path / "f.safetensors"), *VIEW, "--root", files[1]]) == 2
    assert f"{os.path.dirname(video)}" in (said := error_of(capsys)) and "lies outside of --root" in said


def test_lists_of_videos_have_their_own_folder(files, tmp_path, capsys):
    argv = ["fewshot", str(files[0]), "--novel", str(files[2]), "--videos", files[1], "--root", files[1]]
    assert cli.main(argv) == 2 and "--root is where the paths of manifests start" in error_of(capsys)


@pytest.mark.parametrize("command", ["fewshot", "probe"])
def test_a_leak_is_found_beside_it(command, tmp_path, files, tiny_suites, capsys):
    """The lists of pretraining are not below ``--root``; what they share with what is below it is said line by line."""
    run, seen = tmp_path / "trained", tiny_suites["motion8"]["test"]
    run.mkdir()
    small_run(run, f"data.datasets=[{seen}]", "data.datasets_weights=null")
    novel = ["--novel"] if command == "fewshot" else ["--fewshot"]
    argv = [command, str(run), *novel, str(files[2]), *EPISODES, *VIEW, "--root", files[1]]
    argv += ["--json", str(tmp_path / "found.json"), *(["--pretrain", seen] if command == "fewshot" else [])]
    assert cli.main(argv) == 0
    said = [line for line in capsys.readouterr().out.split("\n") if "the same file of" in line]
    assert len(said) == 1 and said[0].startswith("  8 samples (100.0 %)")
    assert json.loads((tmp_path / "found.json").read_text())["manifests"]["root"] == files[1]


class Gone(io.StringIO):
    """A pipe whose reader has left."""

    def __init__(self, file):
        super().__init__()
        self.file = file

    def write(self, text):
        raise BrokenPipeError

    def fileno(self):
        return self.file.fileno()


@pytest.mark.parametrize("name", ["probe of episodes", "fewshot", "geometry", "data check", "doctor"])
def test_what_was_measured_is_written_though_nobody_reads_it(name, files, tmp_path, monkeypatch):
    words = ["doctor"] if name == "doctor" else argv(name, files, files[2], tmp_path)
    words += EPISODES if name == "fewshot" else []
    out = tmp_path / "out.json"
    with (tmp_path / "pipe").open("w") as file, monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", Gone(file))
        try:
            code = cli.main([*words, "--write-clean" if name == "data check" else "--json", str(out)])
        except SystemExit as stop:  # of rich
            code = stop.code
    assert code == 1
    assert out.stat().st_size > 100


def test_features_in_python(files):
    encoder, how = tiny_encoder(), {"num_frames": 4, "crop_size": 32, "frame_step": 1}
    found = encoder.features(files[2], root=files[1], **how)
    assert torch.equal(found.x, encoder.features([str(path) for path in found.videos], **how).x)
    assert all(path.startswith(files[1]) for path in found.videos)
    with pytest.raises(DataError, match="No such file|cannot be read|no readable"):
        encoder.features(files[2], **how)
    with pytest.raises(DataError, match="--root: .*nowhere: no such folder"):
        encoder.features(files[2], root=f"{files[1]}/nowhere", **how)
