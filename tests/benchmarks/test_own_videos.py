"""The transcript of docs/own_videos.md: the page holds what was recorded, and that is a whole first hour."""

import json
import os
import subprocess
import sys

import pytest

from benchmarks import own_videos

ROOT, FILMS = own_videos.ROOT, os.environ.get("VJEPA_FAST_FILMS")


def goes_through(results):
    """All commands ended well, what cannot be read was named and left out, and the rest went its way."""
    assert sum(results["videos"].values()) == own_videos.VIDEOS and results["videos"]["real"]
    commands = [entry["command"] for entry in results["commands"]]
    assert commands == [command.format(minutes=results["minutes"]) for command in own_videos.COMMANDS]
    assert all(entry["code"] == 0 for entry in results["commands"])
    train, listed, checked, _, probe, show = ("\n".join(entry["lines"]) for entry in results["commands"])
    for name in ("empty.mov", "half.mp4", "notes.mp4"):
        assert f"left out: videos/odd/{name}: " in train
    assert "videos: 21 videos, " in train and "chosen for --minutes" in train and "checkpoint: runs/mine/" in train
    assert "clips.csv" in listed and "train.csv: " in checked
    assert "random init" in probe and "target_encoder" in probe
    assert "mine.html: " in show and "3 clips, 3 with nearest ones" in show


def test_the_page_holds_the_recorded_transcript():
    results = json.loads((ROOT / "benchmarks/results/own_videos.json").read_text(encoding="utf-8"))
    text = (ROOT / "docs/own_videos.md").read_text(encoding="utf-8")
    assert own_videos.page(text, results) == text and "$ vjepa-fast show runs/mine --out mine.html" in text
    goes_through(results)


@pytest.mark.skipif(FILMS is None, reason="takes minutes, and real films; VJEPA_FAST_FILMS names their folder")
def test_the_script_goes_through_all_commands(tmp_path):
    out = tmp_path / "results.json"
    small = "--steps 2 --device cpu --set data.num_workers=0 --set runtime.dtype=float32 --set data.batch_size=4"
    argv = ["--films", FILMS, "--minutes", "0.02", "--train", small, "--json", str(out)]
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.own_videos", *argv], cwd=ROOT, capture_output=True, text=True, timeout=1800
    )
    assert done.returncode == 0, done.stdout + done.stderr
    results = json.loads(out.read_text())
    goes_through(results)
    assert str(tmp_path) not in own_videos.transcript(results)
