"""Rendering suites and decoding them once."""

import pytest

from vjepa_fast.data.synthetic import render_suite
from vjepa_fast.errors import DataError
from vjepa_fast.study.run.clips import decode, load_clips, render


def test_an_outdated_rendering_is_replaced_and_a_strangers_is_not(tmp_path):
    values = dict(name="objects", splits={"train": 2}, size=32, frames=2, fps=8)
    ours, other = str(tmp_path / "ours"), str(tmp_path / "other")
    render(folder=ours, seed=0, key="old", **values)
    first = (tmp_path / "ours" / "train" / "000000.jpg").read_bytes()
    render(folder=ours, seed=1, key="new", **values)
    assert (tmp_path / "ours" / "train" / "000000.jpg").read_bytes() != first
    render_suite("objects", other, splits={"train": 2}, size=32, seed=0)
    with pytest.raises(DataError, match="already holds"):
        render(folder=other, seed=1, key="new", **values)


def test_decoded_clips_are_read_back(tmp_path):
    found = render("objects", str(tmp_path / "s"), {"train": 3, "test": 2}, 32, 2, 8, 0, "key")
    path = decode(found, ["train", "test"], {"num_frames": 2, "crop_size": 32}, str(tmp_path / "cache" / "c.st"))
    parts = load_clips(path, "objects")
    assert list(parts) == ["test", "train"] and parts["train"].name == "objects-train" and parts["test"].images
    assert parts["train"].clips.shape == (3, 3, 2, 32, 32) and len(parts["test"].labels) == 2
    assert [p.name for p in (tmp_path / "cache").iterdir()] == ["c.st"]
