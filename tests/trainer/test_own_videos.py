"""A folder of somebody's videos, good, odd and broken, becomes a manifest that can be trained on."""

import json
import os
import shutil

import numpy as np
import pytest

from vjepa_fast import config
from vjepa_fast.data import load_manifest
from vjepa_fast.data.synthetic.write import write_video
from vjepa_fast.errors import DataError
from vjepa_fast.trainer.own_videos import Prepared, choose_pace, made_from, prepare_videos


@pytest.fixture
def videos(tmp_path, tiny_suites):
    """Four good videos at three depths, a broken one, a hidden one and an image."""
    good = load_manifest(tiny_suites["motion8"]["train"]).paths
    folder = tmp_path / "videos"
    for place, path in zip(("a b.mp4", "c.mp4", "trip/d.mp4", "trip/far/away/e.mp4"), good):
        (folder / place).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, folder / place)
    (folder / "broken.mp4").write_bytes(b"no video" * 99)
    (folder / ".hidden.mp4").write_bytes(b"no video")
    shutil.copy(load_manifest(tiny_suites["objects"]["train"]).paths[0], folder / "thumb.jpg")
    return folder


def test_good_ones_are_listed_and_bad_ones_named(videos, tmp_path):
    out = tmp_path / "run" / "data"
    found = prepare_videos(videos, out, workers=1)
    names = [os.path.basename(path) for path in load_manifest(found.manifest).paths]
    assert names == ["a b.mp4", "c.mp4", "d.mp4", "e.mp4"] and found.videos == 4
    assert load_manifest(found.manifest).labels.tolist() == [1, 1, 0, 0]
    assert json.loads((out / "classes.json").read_text()) == ["trip", "videos"]
    [(path, reason)] = found.left_out
    assert path == str(videos / "broken.mp4") and reason and path not in reason
    assert any("1 image" in note for note in found.notes)
    assert made_from(out) == str(videos) and found.hours > 0


def test_videos_of_which_no_clip_can_be_read_are_left_out(videos, tmp_path):
    write_video(videos / "short.mp4", np.zeros((5, 32, 32, 3), np.uint8))
    out = tmp_path / "out"
    found = prepare_videos(videos, out, workers=1)
    assert found.videos == 4 and {os.path.basename(p) for p, _ in found.left_out} == {"broken.mp4", "short.mp4"}
    rows = [json.loads(line) for line in (out / "quarantine.jsonl").read_text().splitlines()]
    assert {os.path.basename(row["path"]) for row in rows} == {"broken.mp4", "short.mp4"}
    assert all(row["reason"] for row in rows)


def test_where_none_can_be_used_nothing_is_left(tmp_path):
    videos = tmp_path / "videos"
    with pytest.raises(DataError, match="videos: no such folder"):
        prepare_videos(videos, tmp_path / "out")
    videos.mkdir()
    with pytest.raises(DataError, match="no video in it"):
        prepare_videos(videos, tmp_path / "out")
    (videos / "x.mp4").write_bytes(b"x" * 100)
    with pytest.raises(DataError, match=rf"{videos}: none of the files can be used; the first: .*x\.mp4"):
        prepare_videos(videos, tmp_path / "out", workers=1)
    assert [p.name for p in tmp_path.iterdir()] == ["videos"]


def test_the_pace_is_that_at_which_nearly_all_are_long_enough():
    long, short, shorter, shortest = (300, 30.0), (32, 30.0), (16, 30.0), (9, 30.0)
    assert choose_pace([long] * 10) == (16, {"fps": 8})
    assert choose_pace([long] * 9 + [shortest]) == (16, {"fps": 8})
    assert choose_pace([long] * 8 + [short] * 2) == (16, {"frame_sample_rate": 2})
    assert choose_pace([shorter] * 10) == (16, {"frame_sample_rate": 1})
    assert choose_pace([shortest] * 10) == (8, {"frame_sample_rate": 1})


def test_a_folder_of_any_name_is_trained_on(tmp_path):
    """Its path goes to the recipe as YAML."""
    for name in ("2024-01-01", "a #2: b", "\U0001f3ac", 'it\'s "it"'):
        found = Prepared(str(tmp_path / name / "train.csv"), 1, 0.1, 16, {"fps": 8})
        assert config.load("own_videos", found.overrides).data.datasets == (str(tmp_path / name / "train.csv"),)
