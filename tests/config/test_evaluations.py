"""Evaluation files of the published code: recognised, and answered with a command of ours that exists."""

from __future__ import annotations

import re
import shlex

import pytest
import yaml

from vjepa_fast import cli
from vjepa_fast.cli import probe
from vjepa_fast.evaluation import get_task

VIDEO, IMAGE = "video_classification_frozen", "image_classification_frozen"


def video(classes, frames, step, clips, epochs):
    return {
        "dataset_train": "my data/train.csv",
        "dataset_val": "val.csv",
        "num_classes": classes,
        "frames_per_clip": frames,
        "frame_step": step,
        "num_segments": clips,
        "num_views_per_segment": 3,
        "resolution": 256,
    }, epochs


FILES = {  # classes, frames, step, clips, epochs as published
    "ssv2": (VIDEO, *video(174, 16, 4, 2, 20)),
    "k400": (VIDEO, *video(400, 16, 4, 8, 20)),
    "diving48": (VIDEO, *video(48, 32, 2, 4, 100)),
    "coin": (VIDEO, *video(180, 16, 4, 8, 20)),
    "jester": (VIDEO, *video(27, 32, 2, 4, 100)),
    "in1k": (IMAGE, {"dataset_name": "ImageNet", "num_classes": 1000, "resolution": 256}, 20),
}


def content(name):
    kind, data, epochs = FILES[name]
    wrapper = {"img_as_video_nframes": 16} if kind == IMAGE else {"max_frames": 128}
    return {
        "nodes": 8,
        "eval_name": kind,
        "folder": "evals",
        "experiment": {"data": data, "optimization": {"num_epochs": epochs, "batch_size": 4}},
        "model_kwargs": {"checkpoint": "vitl.pt", "wrapper_kwargs": wrapper},
    }


@pytest.fixture
def refusal(tmp_path, capsys):
    def refusal(values, *command):
        path = tmp_path / "eval.yaml"
        path.write_text(yaml.safe_dump(values))
        assert cli.main([*command, str(path)]) == 2
        message = capsys.readouterr().err
        assert message.startswith(f"error: {path}: is an evaluation") and message.count("\n") == 1
        return message

    return refusal


@pytest.mark.parametrize("command", [("train",), ("config", "check"), ("config", "show")])
def test_every_command_answers_alike(refusal, command):
    assert "vjepa-fast probe vitl.pt" in refusal(content("ssv2"), *command)


@pytest.mark.parametrize("name", FILES)
def test_the_command_exists_and_says_what_the_file_says(refusal, name, monkeypatch):
    message = refusal(content(name), "config", "check")
    words = shlex.split(re.search(r"here it is: (vjepa-fast .*?)(?: \(|; see)", message)[1])
    seen = []
    monkeypatch.setattr(probe, "run", lambda args: seen.append(args) or 0)
    monkeypatch.setattr("vjepa_fast.cli._arguments.manifest_file", lambda text: text)
    assert cli.main(words[1:]) == 0
    (args,), (_, data, epochs) = seen, FILES[name]
    assert (args.checkpoint, args.which, args.probes, args.crop_size) == (
        "vitl.pt",
        "target_encoder",
        ["attentive"],
        256,
    )
    if name == "in1k":
        assert (args.task, args.num_frames, args.epochs) == (None, 16, 20)
        return
    assert (args.train, args.test) == ("my data/train.csv", "val.csv")
    assert (args.task is not None) == (name in ("ssv2", "k400", "diving48"))
    of = get_task(name) if args.task else args
    assert (of.num_frames, of.frame_step, of.clips, of.crops, of.epochs) == (
        data["frames_per_clip"],
        data["frame_step"],
        data["num_segments"],
        data["num_views_per_segment"],
        epochs,
    )
    assert args.task in (None, name)


def test_inference_and_what_is_not_here(refusal):
    assert "a released one is not read" in refusal({**content("ssv2"), "val_only": True}, "train")
    message = refusal({"eval_name": "action_anticipation_frozen", "experiment": None}, "train")
    assert "that this package does not have" in message
    assert "vjepa-fast probe CHECKPOINT" in refusal({"eval_name": VIDEO}, "train")
