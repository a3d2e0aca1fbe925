"""``--root`` of the commands that read manifests: where their paths start, and what they do not lead out of."""

import os

import pytest
import torch

from tests.evaluation.cases import small_run, tiny_encoder
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
    "fewshot, leakage": ["fewshot", "RUN", "--novel", "GOOD", "--pretrain", "CSV", *EPISODES],
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


def test_features_in_python(files):
    encoder, how = tiny_encoder(), {"num_frames": 4, "crop_size": 32, "frame_step": 1}
    found = encoder.features(files[2], root=files[1], **how)
    assert torch.equal(found.x, encoder.features([str(path) for path in found.videos], **how).x)
    assert all(path.startswith(files[1]) for path in found.videos)
    with pytest.raises(DataError, match="No such file|cannot be read|no readable"):
        encoder.features(files[2], **how)
    with pytest.raises(DataError, match="--root: .*nowhere: no such folder"):
        encoder.features(files[2], root=f"{files[1]}/nowhere", **how)
